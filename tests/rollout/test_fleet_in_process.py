"""What the fleet asks of all its workers at once; they are HTTP servers in threads of this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web

from tests.rollout.answering_worker import AnsweringWorker, fleet_of
from tests.rollout.fleets import request
from tests.samples import answer
from xrl.rollout.answers import WorkerRefused
from xrl.rollout.fleet import Fleet, NoneReady, RolloutCounts, WorkerGone
from xrl.types import Completion, GenerateRequest

ASKED = request(5, 3, num_samples=1)
# As good_answer answers it.
ANSWERED = [answer(3, 5, logprobs=[-0.5, -1.5])]
TIMEOUT_S = 60.0


def says(body: Any, *, status: int = 200) -> AnsweringWorker:
    """A worker with one answer to every request."""

    async def answers(*_: object) -> web.StreamResponse:
        return web.Response(body=json.dumps(body).encode(), status=status, content_type="application/json")

    return AnsweringWorker(answers)


def hear(fleet: Fleet, asked: GenerateRequest = ASKED) -> list[tuple[int, list[Completion]]]:
    """Who answered, and what."""
    return [(worker.number, found) for worker, found in fleet.ask_all(asked, timeout_s=TIMEOUT_S)]


def update(fleet: Fleet, version: int) -> None:
    """All workers have taken these weights."""
    fleet.roster.updated({worker.number: fleet.roster.generation(worker) for worker in fleet.workers}, version)


def test_every_worker_is_asked_the_same_question_once() -> None:
    workers = [AnsweringWorker() for _ in range(3)]
    with fleet_of(*workers) as fleet:
        update(fleet, 0)
        assert hear(fleet) == [(number, ANSWERED) for number in range(3)]
    assert [worker.num_asked for worker in workers] == [1, 1, 1]


def test_a_worker_that_answers_all_of_them_wrongly_is_lost_at_once_and_left_out() -> None:
    with fleet_of(says([]), AnsweringWorker()) as fleet:
        assert hear(fleet) == [(1, ANSWERED)]
        assert fleet.num_lost == 1
        assert hear(fleet) == [(1, ANSWERED)]


def test_a_worker_with_other_weights_is_left_out_and_not_lost() -> None:
    with fleet_of(AnsweringWorker(), AnsweringWorker()) as fleet:
        update(fleet, 3)  # they answer with version 0
        assert hear(fleet) == []
        assert (fleet.ready(), fleet.num_lost) == ([], 0)
        update(fleet, 0)
        assert len(hear(fleet)) == 2


def test_a_worker_that_hangs_up_is_lost_and_left_out() -> None:
    async def hang_up(http: web.Request, _: GenerateRequest) -> web.StreamResponse:
        assert http.transport is not None
        http.transport.close()
        return web.Response()

    with fleet_of(AnsweringWorker(hang_up), AnsweringWorker()) as fleet:
        assert hear(fleet) == [(1, ANSWERED)]
        assert [worker.number for worker in fleet.ready()] == [1]


def test_a_worker_that_refuses_is_named() -> None:
    refusal = {"type": "EngineError", "error": "out of memory"}
    with (
        fleet_of(AnsweringWorker(), says(refusal, status=500)) as fleet,
        pytest.raises(WorkerRefused, match=r"rollout worker 1 \(.*\): EngineError: out of memory"),
    ):
        hear(fleet)


def test_where_one_lost_worker_is_one_too_many_the_question_ends_the_run() -> None:
    with (
        fleet_of(says([]), AnsweringWorker(), on_lost_worker="stop") as fleet,
        pytest.raises(WorkerGone, match="rollout worker 0 is lost .*--on-lost-worker is stop"),
    ):
        hear(fleet)


def test_that_nobody_is_ready_is_a_value_after_which_a_rollout_goes_on_with_new_weights() -> None:
    with fleet_of(AnsweringWorker(), AnsweringWorker(), rollout_max_retries=9) as fleet:
        update(fleet, 3)  # they answer with version 0
        counts = RolloutCounts()
        stream = fleet.generate([ASKED, ASKED], counts, updates=True)
        assert next(stream) == NoneReady()
        update(fleet, 0)
        assert dict(stream) == {0: ANSWERED, 1: ANSWERED}  # type: ignore[arg-type]
        assert counts.finished == 2 and counts.retried == counts.stale >= 2
        assert fleet.num_lost == 0


def test_that_nobody_is_ready_is_the_end_where_weights_cannot_be_given_anew() -> None:
    with fleet_of(AnsweringWorker(), rollout_max_retries=9) as fleet:
        update(fleet, 3)
        with pytest.raises(WorkerGone, match="no rollout worker is left"):
            list(fleet.generate([ASKED], RolloutCounts()))


def test_that_all_workers_are_lost_is_the_end_even_where_weights_can_be_given_anew() -> None:
    with (
        fleet_of(says([]), rollout_max_retries=9) as fleet,
        pytest.raises(WorkerGone, match=r"no rollout worker is left \(.* wrong answers in a row"),
    ):
        list(fleet.generate([ASKED], RolloutCounts(), updates=True))


def test_all_workers_sleep_and_wake() -> None:
    workers = [AnsweringWorker() for _ in range(2)]
    with fleet_of(*workers) as fleet:
        fleet.sleep()
        fleet.wake()
    for worker in workers:
        assert worker.told == ["/sleep?level=2", "/wakeup"]  # weights and all: an update comes before the next request


@pytest.mark.parametrize(("path", "action"), [("/sleep", Fleet.sleep), ("/wakeup", Fleet.wake)])
def test_a_worker_that_does_not_say_that_it_has_done_so_is_lost(path: str, action: Callable[[Fleet], None]) -> None:
    odd = AnsweringWorker()
    odd.says[path] = ["done"]
    with fleet_of(AnsweringWorker(), odd) as fleet:
        action(fleet)
        assert [worker.number for worker in fleet.ready()] == [0]
        assert fleet.num_lost == 1
