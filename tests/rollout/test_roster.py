"""Who is ready, stale and lost, and who is started again. Workers are a test's words: no process runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from xrl.config import RolloutConfig
from xrl.rollout.answers import WorkerFault
from xrl.rollout.process import WorkerGone
from xrl.rollout.roster import FAULTS_IN_A_ROW, Roster

TIMEOUT_S = 60.0


class Worker:
    """Listens, ends and is started again as a test says."""

    host, log_place, max_requests = "10.0.0.1", "its log is there", None

    def __init__(self, number: int, *, is_ours: bool = True) -> None:
        self.number, self.is_ours = number, is_ours
        self.url = f"http://10.0.0.{number}:80"
        self.listens = self.is_alive = True
        self.has_ended = False
        self.cannot_restart: Exception | None = None
        self.may_restart, self.has_restarted = threading.Event(), threading.Event()
        self.may_restart.set()
        self.num_restarts = self.num_terminated = 0

    def poll(self) -> bool:
        return self.listens

    def log_tail(self) -> str:
        return self.log_place

    def restart(self) -> None:
        assert self.may_restart.wait(TIMEOUT_S)
        self.num_restarts += 1
        if self.cannot_restart is not None:
            raise self.cannot_restart
        self.has_ended = False

    def terminate(self) -> None:
        self.num_terminated += 1


MakeRoster = Callable[..., Roster]


@pytest.fixture
def make_roster() -> Iterator[MakeRoster]:
    """Makes rosters whose workers have weights version 0; all are closed afterwards."""
    rosters: list[Roster] = []

    def make(*workers: Worker, **settings: Any) -> Roster:
        roster = Roster(workers, RolloutConfig(**settings))  # type: ignore[arg-type]
        rosters.append(roster)
        update(roster, 0)
        return roster

    yield make
    for roster in rosters:
        for worker in roster.workers:
            worker.may_restart.set()  # type: ignore[attr-defined]
        roster.close(TIMEOUT_S)


def update(roster: Roster, version: int) -> None:
    """All workers have taken these weights."""
    roster.updated({worker.number: roster.generation(worker) for worker in roster.workers}, version)


def ready(roster: Roster) -> list[int]:
    return [worker.number for worker in roster.ready()]


def wait_for_restarts(roster: Roster) -> None:
    for thread in roster._restarts:
        thread.join(TIMEOUT_S)


def fault(number: int) -> WorkerFault:
    return WorkerFault(f"rollout worker {number}", "output_ids is missing")


def test_those_are_ready_that_took_the_last_update_whole(make_roster: MakeRoster) -> None:
    workers = [Worker(number) for number in range(3)]
    roster = make_roster(*workers)
    roster.updated({0: 0, 2: 0}, 1)
    assert ready(roster) == [0, 2] and roster.version == 1
    assert roster.alive == [workers[0], workers[2]]


def test_before_the_first_update_everybody_is_ready_who_listens() -> None:
    workers = [Worker(0), Worker(1)]
    workers[1].url = ""
    assert ready(Roster(workers, RolloutConfig())) == [0]  # type: ignore[arg-type]


def test_a_worker_whose_process_ended_is_found_lost_and_starts_a_new_generation(make_roster: MakeRoster) -> None:
    workers = [Worker(0), Worker(1)]
    roster = make_roster(*workers, rollout_max_restarts=0)
    workers[0].has_ended = True
    assert ready(roster) == [1]
    assert (roster.generation(workers[0]), roster.generation(workers[1])) == (1, 0)
    assert (roster.num_lost, roster.num_restarted) == (1, 0)


def test_a_lost_worker_is_started_again_and_is_ready_with_the_next_update(make_roster: MakeRoster) -> None:
    workers = [Worker(0), Worker(1)]
    roster = make_roster(*workers)
    roster.lose(workers[0], "it hangs")
    wait_for_restarts(roster)
    assert workers[0].num_restarts == 1
    assert ready(roster) == [1]
    assert roster.reachable() == workers
    update(roster, 1)
    assert ready(roster) == [0, 1]


def test_nobody_waits_for_a_worker_that_is_started_again(make_roster: MakeRoster) -> None:
    workers = [Worker(0), Worker(1)]
    roster = make_roster(*workers)
    workers[0].may_restart.clear()
    roster.lose(workers[0], "it hangs")
    assert ready(roster) == [1] and roster.reachable() == [workers[1]]
    assert roster.is_any_starting
    workers[0].may_restart.set()
    wait_for_restarts(roster)
    assert not roster.is_any_starting


def test_a_worker_is_started_again_only_so_often(make_roster: MakeRoster) -> None:
    worker = Worker(0)
    roster = make_roster(worker, Worker(1), rollout_max_restarts=2)
    for _ in range(3):
        roster.lose(worker, "it hangs")
        wait_for_restarts(roster)
    assert (worker.num_restarts, roster.num_lost, roster.num_restarted) == (2, 3, 2)
    roster.lose(worker, "it hangs")  # it is lost already
    assert roster.num_lost == 3


def test_a_worker_that_cannot_be_started_again_stays_lost_for_that_reason(make_roster: MakeRoster) -> None:
    worker = Worker(0)
    roster = make_roster(worker)
    worker.cannot_restart = WorkerGone("its process hangs")
    roster.lose(worker, "it hangs")
    wait_for_restarts(roster)
    with pytest.raises(WorkerGone, match=r"no rollout worker is left \(.*: it cannot be started again: its proc"):
        roster.reachable()


def test_what_is_said_of_an_earlier_generation_costs_nothing(make_roster: MakeRoster) -> None:
    worker = Worker(0)
    roster = make_roster(worker)
    roster.lose(worker, "it hangs", generation=0)
    wait_for_restarts(roster)
    roster.lose(worker, "it hangs", generation=0)
    for _ in range(FAULTS_IN_A_ROW):
        roster.mark_faulty(worker, fault(0), generation=0)
    roster.mark_faulty(worker, fault(0), generation=1)
    assert roster.num_lost == 1
    roster.updated({0: 0}, 1)  # it took them before it was lost
    assert ready(roster) == []


def test_wrong_answers_in_a_row_cost_the_worker_and_a_good_one_between_them_does_not(make_roster: MakeRoster) -> None:
    worker = Worker(0)
    roster = make_roster(worker, rollout_max_restarts=0)
    for _ in range(3):
        for _ in range(FAULTS_IN_A_ROW - 1):
            roster.mark_faulty(worker, fault(0), generation=0)
        roster.mark_well(worker)
    assert ready(roster) == [0]
    for _ in range(FAULTS_IN_A_ROW):
        roster.mark_faulty(worker, fault(0), generation=0)
    assert ready(roster) == []
    assert f"{FAULTS_IN_A_ROW} wrong answers in a row, the last: output_ids is missing" in str(roster.none_left())


def test_a_stale_worker_is_not_ready_until_its_next_update_and_not_lost(
    make_roster: MakeRoster, caplog: pytest.LogCaptureFixture
) -> None:
    workers = [Worker(0), Worker(1)]
    roster = make_roster(*workers)
    roster.mark_stale(workers[1], [4])
    assert ready(roster) == [0] and roster.num_lost == 0
    assert "rollout worker 1 sampled with weights version 4 instead of version 0" in caplog.text
    update(roster, 1)
    assert ready(roster) == [0, 1]


def test_an_update_may_help_while_one_worker_is_not_lost(make_roster: MakeRoster) -> None:
    workers = [Worker(0), Worker(1)]
    roster = make_roster(*workers, rollout_max_restarts=0)
    roster.lose(workers[0], "it ended")
    roster.mark_stale(workers[1], [4])
    assert ready(roster) == [] and roster.can_recover
    roster.lose(workers[1], "it ended")
    assert not roster.can_recover
    with pytest.raises(WorkerGone, match=r"no rollout worker is left \(rollout worker 0 .*it ended; rollout worker 1 "):
        roster.alive  # noqa: B018


def test_a_worker_that_somebody_started_is_taken_back_when_it_answers_again(
    make_roster: MakeRoster, caplog: pytest.LogCaptureFixture
) -> None:
    theirs, ours = Worker(0, is_ours=False), Worker(1)
    roster = make_roster(theirs, ours)
    theirs.listens = False
    assert roster.reachable() == [ours]
    assert theirs.num_restarts == 0 and roster.num_lost == 1
    theirs.listens = True
    assert roster.reachable() == [theirs, ours]
    assert "rollout worker 0 answers again and is taken back" in caplog.text


def test_a_worker_that_lies_and_is_well_by_its_own_word_is_taken_back_only_so_often(make_roster: MakeRoster) -> None:
    liar, honest = Worker(0, is_ours=False), Worker(1)
    roster = make_roster(liar, honest, rollout_max_restarts=1)
    found = []
    for _ in range(2):
        for _ in range(FAULTS_IN_A_ROW):
            roster.mark_faulty(liar, fault(0), generation=roster.generation(liar))
        found.append([worker.number for worker in roster.reachable()])
    assert found == [[0, 1], [1]]


def test_a_worker_that_does_not_start_in_time_is_lost(make_roster: MakeRoster, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(0)
    worker.listens = False
    roster = make_roster(worker, rollout_max_restarts=0)
    monkeypatch.setattr("xrl.rollout.roster.START_TIMEOUT_S", 0.0)
    with pytest.raises(WorkerGone, match="it did not start within 0 s"):
        roster.reachable()


def test_where_one_lost_worker_is_one_too_many_its_loss_is_an_error(make_roster: MakeRoster) -> None:
    worker = Worker(0)
    roster = make_roster(worker, Worker(1), on_lost_worker="stop")
    with pytest.raises(WorkerGone, match=r"rollout worker 0 is lost \(it hangs\), and --on-lost-worker is stop"):
        roster.lose(worker, "it hangs")
    assert worker.num_restarts == 0


def test_a_worker_that_is_started_while_all_end_is_told_to_end(make_roster: MakeRoster) -> None:
    worker = Worker(0)
    roster = make_roster(worker)
    worker.may_restart.clear()
    roster.lose(worker, "it hangs")
    closing = threading.Thread(target=roster.close, args=(TIMEOUT_S,))
    closing.start()
    while not roster._is_closing:
        time.sleep(0.001)
    worker.may_restart.set()
    closing.join(TIMEOUT_S)
    assert worker.num_terminated == 1
    roster.lose(worker, "it ended")  # nobody is started any more
    assert worker.num_restarts == 1
