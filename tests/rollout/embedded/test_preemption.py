"""A KV cache too small for all samples at once: some wait, none is lost, and nobody can tell from the answers."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.rollout.engines import generate, request
from tests.samples import contents
from tests.tiny_models import make_model
from xrl.models.checks import checked_shape
from xrl.rollout.embedded import bytes_per_block
from xrl.rollout.embedded.scheduler import Scheduler
from xrl.rollout.engine import Engine
from xrl.types import Completion

MakeEngine = Callable[..., Engine]
NUM_JOBS, NUM_SAMPLES = 8, 3
NEEDED = 128 // 16 + 1  # blocks of one sequence of max_model_len, of which prompt and response begin their own


def small(make_engine: MakeEngine, num_blocks: int = NEEDED, **options: Any) -> Engine:
    model = make_model()
    model.config.architectures = [type(model).__name__]
    shape = checked_shape(model.config.to_dict(), "config.json")
    return make_engine(model, kv_cache_bytes=num_blocks * bytes_per_block(shape, 4), **options)


def answers(engine: Engine, **options: Any) -> list[list[Completion]]:
    settings = {"num_samples": NUM_SAMPLES, "max_new_tokens": 60, **options}
    futures = [
        engine.submit(request([i + 1] * (5 * i + 1), id=str(i), seed=i, **settings))  # type: ignore[arg-type]
        for i in range(NUM_JOBS)
    ]
    return [future.result(timeout=120) for future in futures]


def all_of(found: list[list[Completion]]) -> list[list[dict[str, Any]]]:
    return [list(map(contents, completions)) for completions in found]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Scheduler], None]], None]:
    """Has a function called after each search for room, in the engine's own thread."""

    def watch(look: Callable[[Scheduler], None]) -> None:
        make_room = Scheduler._make_room

        def make_room_and_look(scheduler: Scheduler) -> None:
            make_room(scheduler)
            look(scheduler)

        monkeypatch.setattr(Scheduler, "_make_room", make_room_and_look)

    return watch


def test_a_small_cache_gives_the_answers_of_a_large_one(make_engine: MakeEngine) -> None:
    expected = all_of(answers(make_engine(make_model())))
    for num_blocks in (NEEDED, 2 * NEEDED, 3 * NEEDED):
        engine = small(make_engine, num_blocks)
        assert all_of(answers(engine)) == expected
        engine.sleep()
        assert engine.num_preemptions > 0  # type: ignore[attr-defined]
        engine.wake()
        assert all_of(answers(engine)) == expected


def test_the_cache_stays_below_its_cap_and_all_blocks_come_back(make_engine: MakeEngine, watched: Any) -> None:
    sizes = []
    watched(lambda scheduler: sizes.append((scheduler.cache.num_blocks, scheduler.cache.max_blocks)))
    engine = small(make_engine, 2 * NEEDED)
    answers(engine)
    assert max(size for size, _ in sizes) == 2 * NEEDED == sizes[0][1]
    assert engine._scheduler.cache.num_used_blocks == 0  # type: ignore[attr-defined]


def test_who_came_first_is_never_preempted_for_who_came_last(make_engine: MakeEngine, watched: Any) -> None:
    found = []

    def look(scheduler: Scheduler) -> None:
        running, preempted, waiting = (
            [(int(sequence.job.request.id), sequence.sample) for sequence in sequences]
            for sequences in (scheduler._running, scheduler._preempted, ())
        )
        waiting = [(int(job.request.id), job.num_started) for job in scheduler._waiting]
        order = running + preempted + waiting
        found.append(bool(preempted))
        assert order == sorted(order)

    watched(look)
    answers(small(make_engine))
    assert any(found)


def test_a_sample_aborted_while_it_waits_for_room_comes_back_as_it_is(make_engine: MakeEngine, watched: Any) -> None:
    expected = answers(make_engine(make_model()))
    engine = small(make_engine, 2 * NEEDED)
    aborted: list[str] = []

    def abort_the_first(scheduler: Scheduler) -> None:
        if scheduler._preempted and not aborted:
            aborted.append(scheduler._preempted[-1].job.request.id)
            engine.abort(aborted[0])

    watched(abort_the_first)
    found = answers(engine)
    for i, (some, whole) in enumerate(zip(found, expected, strict=True)):
        if str(i) not in aborted:
            assert list(map(contents, some)) == list(map(contents, whole))
            continue
        assert any(0 < len(answer.token_ids) < 60 and answer.finish_reason == "abort" for answer in some)
        for cut, full in zip(some, whole, strict=True):
            assert cut.token_ids.tolist() == full.token_ids[: len(cut.token_ids)].tolist()
            assert cut.logprobs.tolist() == full.logprobs[: len(cut.logprobs)].tolist()
    assert engine._scheduler.cache.num_used_blocks == 0  # type: ignore[attr-defined]


def test_a_sequence_of_the_greatest_length_fits_into_the_smallest_cache(make_engine: MakeEngine) -> None:
    expected = generate(make_engine(make_model()), [5, 6, 7], max_new_tokens=125, num_samples=2)
    found = generate(small(make_engine), [5, 6, 7], max_new_tokens=125, num_samples=2)
    assert list(map(contents, found)) == list(map(contents, expected))
