"""Requests sharing a batch: who joins, who leaves, and that nobody notices."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from tests.rollout.embedded.parts import cache_of, decoder_of, job
from tests.rollout.engines import generate, request
from tests.samples import contents
from tests.tiny_models import make_model
from xrl.rollout.embedded.scheduler import Scheduler
from xrl.rollout.engine import Engine

MakeEngine = Callable[..., Engine]


def test_same_seed_gives_the_same_answers_alone_and_in_a_crowd(make_engine: MakeEngine) -> None:
    engine = make_engine(make_model())
    alone = generate(engine, [5, 6, 7], num_samples=3, seed=11, max_new_tokens=40)
    crowd = [engine.submit(request([i, i + 1], id=f"crowd {i}", num_samples=3, seed=i)) for i in range(10)]
    among_others = generate(engine, [5, 6, 7], num_samples=3, seed=11, max_new_tokens=40)
    assert [c.token_ids.tolist() for c in among_others] == [c.token_ids.tolist() for c in alone]
    for future in crowd:
        future.result(timeout=60)


def test_samples_of_one_prompt_differ_and_so_do_seeds(make_engine: MakeEngine) -> None:
    engine = make_engine(make_model())
    answers = [
        tuple(completion.token_ids)
        for seed in range(3)
        for completion in generate(engine, [5, 6, 7], num_samples=4, seed=seed)
    ]
    assert len(set(answers)) == len(answers)


def test_more_samples_than_rows_wait_their_turn(make_engine: MakeEngine) -> None:
    model = make_model()
    wide, narrow = make_engine(model, max_batch_size=64), make_engine(model, max_batch_size=3)
    answers = []
    for engine in (wide, narrow):
        futures = [engine.submit(request([i, 9], id=str(i), num_samples=5, seed=i)) for i in range(4)]
        answers.append([[c.token_ids.tolist() for c in future.result(timeout=60)] for future in futures])
    assert answers[0] == answers[1]


def test_rows_with_different_settings_share_a_batch(make_engine: MakeEngine) -> None:
    engine = make_engine(make_model())
    settings = [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.5, "top_k": 3, "seed": 2},
        {"temperature": 2.0, "top_p": 0.5, "seed": 3, "max_new_tokens": 30},
    ]
    apart = [generate(engine, [5, 6], **options)[0].token_ids.tolist() for options in settings]
    futures = [engine.submit(request([5, 6], id=str(i), **options)) for i, options in enumerate(settings)]
    assert [future.result(timeout=60)[0].token_ids.tolist() for future in futures] == apart


def test_a_stop_token_ends_its_answer_and_is_its_last_token(make_engine: MakeEngine) -> None:
    engine = make_engine(make_model())
    free = generate(engine, [5, 6, 7], num_samples=8, seed=1, max_new_tokens=40)
    stop = int(free[0].token_ids[6])
    for unstopped, stopped in zip(
        free, generate(engine, [5, 6, 7], num_samples=8, seed=1, max_new_tokens=40, stop_token_ids=(stop,)), strict=True
    ):
        ids = unstopped.token_ids.tolist()
        length = ids.index(stop) + 1 if stop in ids else 40
        assert stopped.token_ids.tolist() == ids[:length]
        np.testing.assert_allclose(stopped.logprobs, unstopped.logprobs[:length], rtol=0, atol=1e-5)
        assert stopped.finish_reason == ("stop" if stop in ids else "length")


def test_one_new_token_needs_no_decode_step(make_engine: MakeEngine) -> None:
    completions = generate(make_engine(make_model()), [5, 6, 7], num_samples=2, max_new_tokens=1)
    assert [len(c.token_ids) for c in completions] == [1, 1]
    assert [c.finish_reason for c in completions] == ["length", "length"]


def test_all_cache_blocks_are_given_back(make_engine: MakeEngine) -> None:
    engine = make_engine(make_model(), max_batch_size=5)
    futures = [engine.submit(request([i] * 20, id=str(i), num_samples=3, max_new_tokens=40)) for i in range(6)]
    for future in futures:
        future.result(timeout=60)
    assert engine._scheduler.cache.num_used_blocks == 0  # type: ignore[attr-defined]


# The scheduler by itself.


def test_it_is_busy_until_its_last_job_is_done() -> None:
    scheduler = scheduler_of(max_batch_size=8)
    assert not scheduler.is_busy and scheduler.step(3) == []
    short, long = job(5, 6, max_new_tokens=2, num_samples=2), job(7, max_new_tokens=4)
    scheduler.add(short)
    scheduler.add(long)
    assert scheduler.step(3) == [short]  # the first token of each sample and one more
    assert scheduler.is_busy and not long.is_done
    assert scheduler.step(3) == [] and scheduler.step(3) == [long]
    assert not scheduler.is_busy and scheduler.cache.num_used_blocks == 0
    for done, length in ((short, 2), (long, 4)):
        assert sorted(done.completions) == list(range(done.request.num_samples))
        for completion in done.completions.values():
            assert (len(completion.token_ids), completion.finish_reason) == (length, "length")
            assert completion.weights_version == 3


def test_an_aborted_job_comes_back_with_what_each_of_its_samples_has() -> None:
    alone, scheduler = job(7, seed=2), scheduler_of(max_batch_size=3)
    scheduler.add(alone)
    while scheduler.step(0) == []:
        pass
    scheduler = scheduler_of(max_batch_size=3)
    kept, waiting, running = job(7, seed=2), job(5, num_samples=2), job(6, num_samples=3)
    for each in (kept, running, waiting):
        scheduler.add(each)
    for _ in range(4):
        assert scheduler.step(0) == []
    waiting.aborted = running.aborted = True
    assert scheduler.drop_aborted(9) == [waiting, running]
    assert [len(waiting.completions[sample].token_ids) for sample in range(2)] == [0, 0]
    assert [len(running.completions[sample].token_ids) for sample in range(3)] == [5, 5, 0]
    for completion in (*waiting.completions.values(), *running.completions.values()):
        assert (completion.finish_reason, completion.weights_version) == ("abort", 9)
        assert len(completion.token_ids) == len(completion.logprobs)
    assert scheduler.drop_aborted(9) == []
    while scheduler.step(0) == []:
        pass
    assert contents(kept.completions[0]) == contents(alone.completions[0])
    assert scheduler.cache.num_used_blocks == 0


def test_prompts_of_more_tokens_than_a_pass_holds_take_several(monkeypatch: pytest.MonkeyPatch) -> None:
    def answers(scheduler: Scheduler) -> tuple[list[list[int]], list[dict[str, Any]]]:
        """The lengths of the prompts of each pass, and the answers."""
        passes, prefill = [], scheduler.decoder.prefill

        def counted(*inputs: Any, lengths: Sequence[int], cache: Any) -> Any:
            passes.append(list(lengths))
            return prefill(*inputs, lengths=lengths, cache=cache)

        monkeypatch.setattr(scheduler.decoder, "prefill", counted)
        jobs = [job(*[i + 1] * length, seed=i) for i, length in enumerate((10, 15, 30, 5, 21))]
        for each in jobs:
            scheduler.add(each)
        while scheduler.is_busy:
            scheduler.step(0)
        return passes, [contents(each.completions[0]) for each in jobs]

    at_once, expected = answers(scheduler_of(max_batch_size=8))
    assert at_once == [[10, 15, 30, 5, 21]]
    monkeypatch.setattr("xrl.rollout.embedded.scheduler._PREFILL_TOKENS", 25)
    in_passes, found = answers(scheduler_of(max_batch_size=8))
    assert in_passes == [[10, 15], [30], [5], [21]]  # one that is longer goes alone
    assert found == expected


def scheduler_of(*, max_batch_size: int) -> Scheduler:
    decoder = decoder_of(make_model(num_hidden_layers=2))
    return Scheduler(decoder, cache_of(decoder), max_batch_size)
