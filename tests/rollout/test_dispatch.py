"""Which worker gets which request, and what becomes of one that fails. Workers are a test's words: no process runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.rollout.scripted_fleet import Answer, Held, ScriptedFleet, answer_well, ask, whole
from tests.samples import answer
from xrl.launch.exit import RunFailed
from xrl.rollout.answers import StaleAnswer, WeightsId, WorkerFault, WorkerRefused
from xrl.rollout.dispatch import NoneReady, RolloutCounts
from xrl.rollout.process import WorkerGone
from xrl.types import Completion, GenerateRequest

WEIGHTS = WeightsId(run_id="a-run", version=5)
MakeFleet = Callable[..., ScriptedFleet]


@pytest.fixture
def make_fleet() -> Iterator[MakeFleet]:
    fleets: list[ScriptedFleet] = []

    def make(*arguments: Any, **settings: Any) -> ScriptedFleet:
        fleets.append(ScriptedFleet(*arguments, **settings))
        return fleets[-1]

    yield make
    for fleet in fleets:
        fleet.close()


def fails(error: BaseException, *, workers: tuple[int, ...] = (0,)) -> Answer:
    """What these workers say to everything; the others answer well."""

    async def answers(number: int, request: GenerateRequest) -> list[Completion]:
        if number in workers:
            raise error
        return whole(request)

    return answers


def refused(number: int = 0) -> WorkerRefused:
    return WorkerRefused(f"rollout worker {number} (10.0.0.{number}:80)", "EngineError: out of memory")


def test_every_request_is_answered_once_and_by_its_place(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2, rollout_timeout_s=77.0)
    results, counts = fleet.generate(*(ask(place, num_samples=2) for place in range(5)))
    assert results == {place: [answer(place, 2)] * 2 for place in range(5)}
    assert counts == RolloutCounts(sent=5, finished=5)
    assert fleet.timeouts == {77.0}
    assert sorted(name for _, name in fleet.asked) == ["r0", "r1", "r2", "r3", "r4"]


def test_the_worker_with_the_fewest_tokens_to_come_gets_the_next_request(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2, Held())
    fleet.begin(*(ask(place, tokens=tokens) for place, tokens in enumerate((50, 10, 20, 30, 10))))
    # Worker 0 has 50 to come, worker 1 has 10, 30 and 60.
    assert fleet.asked == [(0, "r0"), (1, "r1"), (1, "r2"), (1, "r3"), (0, "r4")]


def test_all_answers_of_a_request_are_counted_as_to_come(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2, Held())
    fleet.begin(ask(0, tokens=10, num_samples=4), ask(1, tokens=30), ask(2, tokens=5), ask(3, tokens=10))
    assert fleet.asked == [(0, "r0"), (1, "r1"), (1, "r2"), (1, "r3")]


def test_what_has_ended_is_no_longer_to_come(make_fleet: MakeFleet) -> None:
    held = Held()
    fleet = make_fleet(2, held, rollout_max_batch_size=1)
    fleet.begin(ask(0, tokens=50), ask(1, tokens=10), ask(2))
    held.let_go("r0")
    fleet.settle()
    assert fleet.asked == [(0, "r0"), (1, "r1"), (0, "r2")]


def test_a_worker_gets_a_quarter_more_sequences_than_it_decodes_at_once(make_fleet: MakeFleet) -> None:
    held = Held()
    fleet = make_fleet(1, held, rollout_max_batch_size=4)
    dispatch, _, _ = fleet.begin(*(ask(place) for place in range(7)))
    assert held.waiting == ["r0", "r1", "r2", "r3", "r4"]
    held.let_go("r2")
    assert dispatch.next_result() == (2, [answer(2, 2)])
    fleet.settle()
    assert held.waiting == ["r0", "r1", "r3", "r4", "r5"]


def test_every_answer_of_a_request_takes_a_place(make_fleet: MakeFleet) -> None:
    held = Held()
    make_fleet(1, held, rollout_max_batch_size=4).begin(ask(0, num_samples=3), ask(1, num_samples=3))
    assert held.waiting == ["r0"]


def test_a_request_for_more_answers_than_fit_goes_to_an_idle_worker_alone(make_fleet: MakeFleet) -> None:
    held = Held()
    fleet = make_fleet(1, held, rollout_max_batch_size=2)
    fleet.begin(ask(0, num_samples=16), ask(1))
    assert held.waiting == ["r0"]
    held.let_go("r0")
    fleet.settle()
    assert held.waiting == ["r1"]


def test_a_worker_gets_no_more_requests_at_once_than_it_takes_and_the_user_hears_why(make_fleet: MakeFleet) -> None:
    held = Held()
    fleet = make_fleet(2, held)
    fleet.most_requests[0] = fleet.most_requests[1] = 1
    fleet.begin(ask(0), ask(1, tokens=20), ask(2))
    assert held.waiting == ["r0", "r1"]
    assert fleet.told == [("bound", 0), ("bound", 1)]


def test_a_full_worker_with_the_fewest_tokens_to_come_holds_nobody_up(make_fleet: MakeFleet) -> None:
    held = Held()
    fleet = make_fleet(2, held, rollout_max_batch_size=2)
    fleet.begin(ask(0, tokens=1000), ask(1), ask(2), ask(3))
    # Worker 1 has its two, of 10 tokens each; worker 0 has room.
    assert fleet.asked == [(0, "r0"), (1, "r1"), (1, "r2"), (0, "r3")]


def test_what_fails_is_asked_of_another_worker_under_another_name(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2, fails(refused()))
    results, counts = fleet.generate(ask(0))
    assert fleet.asked == [(0, "r0"), (1, "r0.1")]  # the engine may not be rid of the first one yet
    assert results == {0: [answer(0, 2)]}
    assert counts == RolloutCounts(sent=1, finished=1, retried=1)


def test_the_only_worker_is_asked_again(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1, fails(refused()), rollout_max_retries=2)
    results, counts = fleet.generate(ask(0))
    assert fleet.asked == [(0, "r0"), (0, "r0.1"), (0, "r0.2")]
    assert (results, counts) == ({0: None}, RolloutCounts(sent=1, failed=1, retried=2))


def test_a_request_is_given_up_after_the_last_try_and_the_first_of_them_says_why(
    make_fleet: MakeFleet, caplog: pytest.LogCaptureFixture
) -> None:
    async def answers(number: int, request: GenerateRequest) -> list[Completion]:
        if request.id.startswith("r1"):
            return whole(request)
        raise WorkerRefused(f"rollout worker {number}", f"no room for {request.id}")

    results, counts = make_fleet(1, answers, rollout_max_retries=1).generate(ask(0), ask(1), ask(2))
    assert results == {0: None, 1: [answer(1, 2)], 2: None}
    assert counts == RolloutCounts(sent=3, finished=1, failed=2, retried=2)
    assert counts.why_failed == "rollout worker 0: no room for r0.1"
    assert "request r2: rollout worker 0: no room for r2.1" in caplog.text


def test_a_worker_that_answers_well_is_told_of(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1)
    fleet.generate(ask(0), ask(1))
    assert fleet.told == [("well", 0), ("well", 0)]


def test_a_wrong_answer_is_held_against_its_worker(make_fleet: MakeFleet) -> None:
    fault = WorkerFault("rollout worker 0 (10.0.0.0:80)", "output_ids is missing")
    fleet = make_fleet(2, fails(fault))
    fleet.generations[0] = 3
    results, _ = fleet.generate(ask(0))
    assert results == {0: [answer(0, 2)]}
    assert fleet.told == [("faulty", 0, str(fault), 3), ("well", 1)]


def test_an_answer_of_other_weights_is_not_used_and_its_worker_gets_no_more(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2, fails(StaleAnswer([4], WEIGHTS)), rollout_max_batch_size=1)
    results, counts = fleet.generate(ask(0), ask(1), ask(2))
    assert results == {place: [answer(place, 2)] for place in range(3)}
    assert counts == RolloutCounts(sent=3, finished=3, retried=1, stale=1)
    assert ("stale", 0, [4]) in fleet.told
    assert [number for number, _ in fleet.asked].count(0) == 1


def test_a_worker_that_cannot_be_reached_is_lost_where_it_has_ended(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2, fails(WorkerGone("/generate: connection refused")))
    fleet.workers[0].is_alive = False
    fleet.generations[0] = 2
    assert fleet.generate(ask(0))[0] == {0: [answer(0, 2)]}
    assert fleet.told == [("lost", 0, "/generate: connection refused", 2), ("well", 1)]


def test_a_worker_that_lives_keeps_its_place_after_a_broken_connection(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2, fails(WorkerGone("/generate: connection reset")))
    assert fleet.generate(ask(0))[0] == {0: [answer(0, 2)]}
    assert fleet.told == [("well", 1)]


def test_a_try_that_took_too_long_is_aborted_by_its_own_name(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1, fails(TimeoutError("no answer within 1 s")), rollout_max_retries=1)
    results, counts = fleet.generate(ask(0))
    assert results == {0: None}
    assert fleet.aborts == [(0, {"request_id": "r0"}), (0, {"request_id": "r0.1"})]
    assert fleet.told == []
    assert counts.why_failed == "rollout worker 0 (10.0.0.0:80): no answer within 1 s"


def test_a_worker_that_does_not_answer_for_its_health_either_is_lost(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2, fails(TimeoutError("no answer within 1 s")))
    fleet.says_well = False
    assert fleet.generate(ask(0))[0] == {0: [answer(0, 2)]}
    assert fleet.told == [("lost", 0, "no answer within 1 s", 0), ("well", 1)]
    assert fleet.aborts == []


def test_it_is_the_worker_s_generation_at_the_question_that_is_lost_by_it(make_fleet: MakeFleet) -> None:
    async def answers(number: int, request: GenerateRequest) -> list[Completion]:
        if number == 1:
            return whole(request)
        fleet.generations[0] = 8  # another request has found out, and it runs again
        raise WorkerGone("it ended")

    fleet = make_fleet(2, answers)
    fleet.workers[0].is_alive, fleet.generations[0] = False, 7
    fleet.generate(ask(0))
    assert fleet.told[0] == ("lost", 0, "it ended", 7)


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_an_answer_that_was_cut_off_and_not_by_us_is_asked_for_again(make_fleet: MakeFleet, reason: Any) -> None:
    async def answers(number: int, request: GenerateRequest) -> list[Completion]:
        return whole(request) if number else [answer(0, 2), answer(0, reason=reason)]

    results, counts = make_fleet(2, answers).generate(ask(0, num_samples=2))
    assert results == {0: [answer(0, 2)] * 2}
    assert counts == RolloutCounts(sent=1, finished=1, retried=1)


def test_a_request_that_is_only_cut_off_fails_by_that(make_fleet: MakeFleet) -> None:
    async def answers(_: int, request: GenerateRequest) -> list[Completion]:
        return [answer(0, reason="error"), answer(1, 2), answer(0, reason="abort")]

    results, counts = make_fleet(1, answers, rollout_max_retries=0).generate(ask(0, num_samples=3))
    assert results == {0: None}
    assert counts.why_failed == (
        "rollout worker 0 (10.0.0.0:80): the answer was cut off, and not by us (finish_reason: abort, error, stop)"
    )


def test_a_rollout_cut_short_comes_back_as_it_is(make_fleet: MakeFleet) -> None:
    held = Held()
    fleet = make_fleet(2, held, rollout_max_batch_size=1)
    dispatch, counts, _ = fleet.begin(ask(0), ask(1), ask(2), ask(3))
    assert held.waiting == ["r0", "r1"]

    def end() -> None:
        held.let_go("r0")  # its last token was on its way
        held.let_go("r1", reason="abort")

    fleet.on_abort = end
    fleet.start(dispatch.cut_short())
    results = dict(dispatch.next_result() for _ in range(4))
    assert results == {0: [answer(0, 2)], 1: [answer(4, reason="abort")], 2: [], 3: []}
    assert counts == RolloutCounts(sent=4, finished=1, unfinished=3)
    assert fleet.aborts[:2] == [(0, {"abort_all": True}), (1, {"abort_all": True})]
    assert fleet.asked == [(0, "r0"), (1, "r1")]


def test_what_was_on_its_way_to_a_worker_is_aborted_again(
    make_fleet: MakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xrl.rollout.dispatch.ABORT_AGAIN_S", 0.0)
    held = Held()
    fleet = make_fleet(1, held)
    dispatch, counts, _ = fleet.begin(ask(0))

    def end_at_the_third() -> None:
        if len(fleet.aborts) == 3:
            held.let_go("r0", reason="abort")

    fleet.on_abort = end_at_the_third
    cut = fleet.start(dispatch.cut_short())
    fleet.start(dispatch.cut_short()).result()  # once is enough
    assert dispatch.next_result() == (0, [answer(4, reason="abort")])
    cut.result()
    assert len(fleet.aborts) >= 3
    assert counts == RolloutCounts(sent=1, unfinished=1)


def test_where_no_worker_is_ready_weights_are_asked_for_once_and_the_requests_go_on(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1)
    fleet.ready_ones.clear()
    num_calls = 0

    def recover() -> None:
        nonlocal num_calls
        num_calls += 1
        fleet.ready_ones.add(0)

    fleet.recover = recover
    results, counts = fleet.generate(ask(0), ask(1), ask(2))
    assert results == {place: [answer(place, 2)] for place in range(3)}
    assert (num_calls, counts) == (1, RolloutCounts(sent=3, finished=3))


def test_weights_that_are_asked_for_are_not_asked_for_again_while_other_requests_end(make_fleet: MakeFleet) -> None:
    held = Held()
    fleet = make_fleet(1, held, rollout_max_batch_size=2)
    num_calls = 0

    def recover() -> None:
        nonlocal num_calls
        num_calls += 1
        fleet.ready_ones.add(0)

    fleet.recover = recover
    dispatch, _, _ = fleet.begin(ask(0), ask(1), ask(2))
    fleet.ready_ones.clear()
    for name in ("r0", "r1"):  # each wakes the one that waits
        held.let_go(name)
        fleet.settle()
    assert [fleet.next_answer(dispatch)[0] for _ in range(2)] == [0, 1]
    fleet.settle()
    held.let_go("r2")
    assert fleet.next_answer(dispatch) == (2, [answer(2, 2)])
    assert num_calls == 1


def test_weights_are_asked_for_again_each_time_that_the_last_worker_is_lost(make_fleet: MakeFleet) -> None:
    async def answers(_: int, request: GenerateRequest) -> list[Completion]:
        if not fleet.workers[0].is_alive:
            raise WorkerGone("it ended")
        return whole(request)

    fleet = make_fleet(1, answers)
    fleet.workers[0].is_alive = False
    num_calls = 0

    def recover() -> None:
        nonlocal num_calls
        num_calls += 1
        fleet.workers[0].is_alive = num_calls == 2
        fleet.ready_ones.add(0)

    fleet.recover = recover
    results, counts = fleet.generate(ask(0))
    assert results == {0: [answer(0, 2)]}
    assert (num_calls, counts) == (2, RolloutCounts(sent=1, finished=1, retried=2))


def test_a_rollout_that_waits_for_weights_goes_on_with_the_next_question_and_not_before(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1)
    fleet.ready_ones.clear()
    fleet.recover = lambda: None  # it could, but we do it here
    dispatch, _, _ = fleet.begin(ask(0))
    assert dispatch.next_result() == NoneReady()
    fleet.ready_ones.add(0)
    fleet.settle()
    assert fleet.asked == []
    assert dispatch.next_result() == (0, [answer(0, 2)])


def test_weights_that_came_to_nobody_are_asked_for_once_more(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1)
    fleet.ready_ones.clear()
    fleet.recover = lambda: None
    dispatch, _, _ = fleet.begin(ask(0))
    assert [dispatch.next_result() for _ in range(3)] == [NoneReady()] * 3


def test_where_weights_would_make_nobody_ready_none_are_asked_for(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1)
    fleet.ready_ones.clear()
    fleet.recover, fleet.can_recover = lambda: None, False
    dispatch, _, _ = fleet.begin(ask(0))
    with pytest.raises(WorkerGone, match="no rollout worker is left"):
        dispatch.next_result()


def test_a_rollout_that_is_cut_short_while_it_waits_for_weights_ends(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1)
    fleet.ready_ones.clear()
    fleet.recover = lambda: None
    dispatch, counts, _ = fleet.begin(ask(0), ask(1))
    assert dispatch.next_result() == NoneReady()
    fleet.start(dispatch.cut_short())
    assert dict(fleet.next_answer(dispatch) for _ in range(2)) == {0: [], 1: []}
    assert counts == RolloutCounts(sent=2, unfinished=2)


def test_the_end_of_the_last_worker_is_the_end_of_the_rollout(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1, fails(WorkerGone("it ended")))
    fleet.workers[0].is_alive = False
    with pytest.raises(WorkerGone, match="no rollout worker is left"):
        fleet.generate(ask(0))


def test_a_lost_worker_ends_the_rollout_where_that_is_asked_for_and_with_it_what_runs(make_fleet: MakeFleet) -> None:
    held = Held()

    async def answers(number: int, request: GenerateRequest) -> list[Completion]:
        if number == 0:
            raise WorkerGone("it ended")
        return await held(number, request)

    fleet = make_fleet(2, answers)
    fleet.workers[0].is_alive, fleet.stops_when_one_is_lost = False, True
    dispatch, _, running = fleet.begin(ask(0), ask(1))
    with pytest.raises(WorkerGone, match=r"worker 0 is lost \(it ended\), and --on-lost-worker is stop"):
        dispatch.next_result()
    running.result()
    fleet.settle()
    assert held.cancelled == ["r1"]


def test_a_rollout_that_nobody_waits_for_any_more_ends_what_runs(make_fleet: MakeFleet) -> None:
    held = Held()
    fleet = make_fleet(1, held)
    _, _, running = fleet.begin(ask(0), ask(1))
    running.cancel()
    fleet.settle()
    assert sorted(held.cancelled) == ["r0", "r1"]


def test_whoever_waits_for_answers_can_look_at_something_else_meanwhile(make_fleet: MakeFleet) -> None:
    class Enough(Exception):
        pass

    looks = iter(range(3))

    def look() -> None:
        if next(looks) == 2:
            raise Enough

    dispatch, _, running = make_fleet(1, Held()).begin(ask(0))
    with pytest.raises(Enough):
        dispatch.next_result(look)
    running.cancel()


def test_a_rollout_that_ends_without_an_answer_is_an_error(
    make_fleet: MakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xrl.rollout.dispatch.LOOK_S", 0.001)
    dispatch, _, running = make_fleet(1, answer_well).begin()
    running.result()
    with pytest.raises(RunFailed, match="ended without an answer to each of its requests"):
        dispatch.next_result()
