"""Updates, sleep, aborts and failures of the embedded engine."""

import dataclasses
import json
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.rollout.engines import buckets, generate, push, request
from tests.tiny_models import make_model
from xrl.config import SettingsError
from xrl.rollout import create_engine
from xrl.rollout.embedded.engine import IDLE_S
from xrl.rollout.embedded.model import Decoder
from xrl.rollout.engine import Engine, EngineError, EngineNotReady, HasDestinations
from xrl.types import WeightBucket
from xrl.weights.checksum import take_bucket

MakeEngine = Callable[..., Engine]


def test_generating_before_the_first_weights_is_refused(make_engine: MakeEngine) -> None:
    engine = make_engine(make_model(), load=False)
    assert engine.weights_version == -1
    with pytest.raises(EngineNotReady, match="no weights"):
        engine.submit(request([1]))


def test_an_engine_that_cannot_be_built_says_so_and_leaves_no_thread(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(Decoder, "__init__", fail)
    before = set(threading.enumerate())
    with pytest.raises(MemoryError, match="no room"):
        make_engine(make_model(), load=False)
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=10)
    assert set(threading.enumerate()) <= before


def test_an_engine_may_be_slow_to_build(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def start_and_linger(thread: threading.Thread) -> None:
        start(thread)
        time.sleep(4 * IDLE_S)  # longer than the loop waits before it gives its cache back

    monkeypatch.setattr(threading.Thread, "start", start_and_linger)
    model = make_model()
    assert generate(make_engine(model), [1])


def test_an_incomplete_update_names_what_is_missing_and_can_be_completed(make_engine: MakeEngine) -> None:
    model = make_model()
    engine = make_engine(model)
    *most, last = buckets(model, version=1)
    for bucket in most:
        engine.load_part(bucket)
    with pytest.raises(EngineError, match=r"missing model\.norm\.weight"):
        engine.finish_update(1)
    with pytest.raises(EngineNotReady, match="version 1 is not finished"):
        engine.submit(request([1]))
    engine.load_part(last)
    engine.finish_update(1)
    assert generate(engine, [1])[0].weights_version == 1


def test_a_layer_may_arrive_in_pieces_whose_memory_is_reused(make_engine: MakeEngine) -> None:
    model = make_model()
    whole, pieces = make_engine(model), make_engine(model, load=False)
    for bucket in buckets(model):
        for name, tensor in bucket.tensors.items():
            piece = tensor.clone()
            pieces.load_part(WeightBucket(version=0, part=bucket.part, tensors={name: piece}))
            piece.fill_(float("nan"))
    pieces.finish_update(0)
    assert generate(pieces, [1, 2])[0].token_ids.tolist() == generate(whole, [1, 2])[0].token_ids.tolist()


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_may_be_written_where_they_stay(make_engine: MakeEngine, tied: bool) -> None:
    models = [make_model(seed=seed, tied=tied) for seed in (1, 2)]
    engine = make_engine(models[0], load=False)
    for version, model in enumerate(models):
        for bucket in buckets(model, version=version):
            _, tensors = take_bucket(bucket.tensors, engine.destinations(bucket.part))
            in_place = [name for name in tensors if tensors[name] is not bucket.tensors[name]]
            assert in_place == (["model.embed_tokens.weight"] if bucket.part == "embeddings" else [])
            with pytest.raises(EngineNotReady, match="an update is under way"):
                engine.submit(request([1]))
            engine.load_part(dataclasses.replace(bucket, tensors=tensors))
        engine.finish_update(version)
        other = make_engine(model)
        assert generate(engine, [1, 2])[0].token_ids.tolist() == generate(other, [1, 2])[0].token_ids.tolist()
    assert isinstance(engine, HasDestinations)


def test_an_update_abandoned_half_way_does_not_count_for_the_next(make_engine: MakeEngine) -> None:
    model = make_model()
    engine = make_engine(model)
    engine.load_part(buckets(model, version=1)[0])
    for bucket in buckets(model, version=2)[1:]:
        engine.load_part(bucket)
    with pytest.raises(EngineError, match="embed_tokens"):
        engine.finish_update(2)


def test_unknown_and_misshapen_tensors_are_refused_by_name(make_engine: MakeEngine) -> None:
    engine = make_engine(make_model())
    with pytest.raises(EngineError, match=r"layers\.0: the model has no tensor 'model\.layers\.0\.extra'"):
        engine.load_part(WeightBucket(version=1, part="layers.0", tensors={"model.layers.0.extra": torch.ones(1)}))
    with pytest.raises(EngineError, match=r"model\.norm\.weight must be of size \[64\], got \[3\]"):
        engine.load_part(WeightBucket(version=1, part="final", tensors={"model.norm.weight": torch.ones(3)}))


def test_answered_requests_hold_no_weights(make_engine: MakeEngine) -> None:
    engine = make_engine(make_model())
    weight = weakref.ref(engine._weights.layers[1].qkv)  # type: ignore[attr-defined]
    assert weight() is not None
    generate(engine, [5, 6, 7])
    for bucket in buckets(make_model(seed=1), version=1):  # at once, before an idle engine gives everything back
        engine.load_part(bucket)
    assert weight() is None


def test_sleep_frees_the_cache_and_wake_resumes(make_engine: MakeEngine) -> None:
    engine = make_engine(make_model())
    before = generate(engine, [5, 6, 7], seed=1)
    assert engine._scheduler.cache.num_blocks > 0  # type: ignore[attr-defined]
    engine.sleep()
    assert engine._scheduler.cache.num_blocks == 0  # type: ignore[attr-defined]
    with pytest.raises(EngineNotReady, match="asleep"):
        engine.submit(request([1]))
    engine.wake()
    assert generate(engine, [5, 6, 7], seed=1)[0].token_ids.tolist() == before[0].token_ids.tolist()


def test_weights_can_be_pushed_while_asleep(make_engine: MakeEngine) -> None:
    engine = make_engine(make_model())
    engine.sleep()
    push(engine, make_model(seed=1), version=1)
    engine.wake()
    assert generate(engine, [5])[0].weights_version == 1


def test_sleep_and_updates_are_refused_with_requests_in_flight(make_engine: MakeEngine) -> None:
    model = make_model()
    engine = make_engine(model, max_model_len=256)
    future = engine.submit(request([1], num_samples=8, max_new_tokens=200))
    with pytest.raises(EngineError, match="requests in flight"):
        engine.sleep()
    with pytest.raises(EngineError, match="requests in flight"):
        push(engine, model, version=1)
    engine.abort()
    future.result(timeout=60)
    engine.sleep()


def test_an_aborted_request_comes_back_with_what_it_has(make_engine: MakeEngine) -> None:
    engine = make_engine(make_model(), max_batch_size=2, max_model_len=256)
    futures = {
        name: engine.submit(request([1], id=name, num_samples=3, max_new_tokens=200)) for name in ("a", "b", "c")
    }
    engine.abort("a")
    engine.abort("c")
    aborted = futures["a"].result(timeout=60)
    assert len(aborted) == 3
    assert {c.finish_reason for c in aborted} == {"abort"}
    assert all(len(c.token_ids) == len(c.logprobs) < 200 for c in aborted)
    assert [c.token_ids.tolist() for c in futures["c"].result(timeout=60)] == [[], [], []]
    assert [c.finish_reason for c in futures["b"].result(timeout=60)] == ["length"] * 3


def test_closing_aborts_what_is_in_flight(make_engine: MakeEngine) -> None:
    engine = make_engine(make_model(), max_model_len=256)
    future = engine.submit(request([1], max_new_tokens=200))
    engine.close()
    assert future.result(timeout=60)[0].finish_reason == "abort"
    with pytest.raises(EngineError, match="closed"):
        engine.submit(request([1]))


def test_a_failing_step_fails_its_requests_and_spares_the_engine(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(make_model())

    def broken(*_: object, **__: object) -> None:
        raise MemoryError("no room for the cache")

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "decode", broken)
        futures = [engine.submit(request([1], id=str(i))) for i in range(3)]
        for future in futures:
            with pytest.raises(EngineError, match="MemoryError: no room for the cache"):
                future.result(timeout=60)
    assert generate(engine, [1])[0].finish_reason == "length"


@pytest.mark.parametrize("culprits", [[3], [0, 9], list(range(10))], ids=str)
def test_request_that_fails_fails_alone(make_engine: MakeEngine, culprits: list[int]) -> None:
    engine = make_engine(make_model(), max_batch_size=8)
    alone = {i: generate(engine, [i + 1, 9], num_samples=3, seed=i) for i in range(10)}
    decoder = engine._decoder  # type: ignore[attr-defined]
    prefill, bad_tokens = decoder.prefill, [i + 1 for i in culprits]

    def failing_prefill(tokens: Tensor, *rest: Tensor, **options: Any) -> Tensor:
        if torch.isin(tokens, torch.tensor(bad_tokens, dtype=tokens.dtype)).any():
            raise RuntimeError("an odd prompt")
        return prefill(tokens, *rest, **options)

    decoder.prefill = failing_prefill
    futures = {i: engine.submit(request([i + 1, 9], id=str(i), num_samples=3, seed=i)) for i in range(10)}
    for i, future in futures.items():
        if i in culprits:
            with pytest.raises(EngineError, match="RuntimeError: an odd prompt"):
                future.result(timeout=60)
        else:
            assert [c.token_ids.tolist() for c in future.result(timeout=60)] == [c.token_ids.tolist() for c in alone[i]]
    decoder.prefill = prefill
    assert [c.token_ids.tolist() for c in generate(engine, [1, 9], num_samples=3)] == [
        c.token_ids.tolist() for c in alone[0]
    ]


def test_requests_that_come_or_are_aborted_while_a_culprit_is_looked_for_are_not_lost(make_engine: MakeEngine) -> None:
    engine = make_engine(make_model())
    decoder = engine._decoder  # type: ignore[attr-defined]
    prefill, late = decoder.prefill, []

    def failing_prefill(tokens: Tensor, *rest: Tensor, **options: Any) -> Tensor:
        if not late:
            late.append(engine.submit(request([5], id="late")))
            engine.abort("1")
        if (tokens == 7).any():
            raise RuntimeError("an odd prompt")
        return prefill(tokens, *rest, **options)

    decoder.prefill = failing_prefill
    futures = [engine.submit(request([token], id=str(place))) for place, token in enumerate((6, 6, 7, 6))]
    with pytest.raises(EngineError):
        futures[2].result(timeout=60)
    reasons = [futures[place].result(timeout=60)[0].finish_reason for place in (0, 1, 3)]
    assert reasons == ["length", "abort", "length"]
    assert late[0].result(timeout=60)[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_ids": []}, "at least one token"),
        ({"token_ids": [98]}, r"token ids must be in \[0, 98\)"),
        ({"token_ids": [-1]}, r"token ids must be in \[0, 98\)"),
        ({"num_samples": 0}, "num_samples and max_new_tokens must be >= 1"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature must be 0 or in .*, got nan"),
        ({"top_p": 0.0}, "top_p"),
        ({"max_new_tokens": 128}, r"prompt \(1\) \+ max_new_tokens \(128\) = 129 tokens exceed max_model_len 128"),
    ],
)
def test_requests_that_cannot_run_are_refused(make_engine: MakeEngine, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_engine(make_model()).submit(request(**({"token_ids": [1]} | options)))


def test_a_request_id_cannot_be_in_flight_twice(make_engine: MakeEngine) -> None:
    engine = make_engine(make_model(), max_model_len=256)
    future = engine.submit(request([1], max_new_tokens=200))
    with pytest.raises(ValueError, match="already in flight"):
        engine.submit(request([1]))
    engine.abort()
    future.result(timeout=60)


def test_more_tokens_than_the_model_has_positions_are_refused(make_engine: MakeEngine) -> None:
    with pytest.raises(SettingsError, match="up to 257 tokens exceed the 256 positions"):
        make_engine(make_model(), max_model_len=257)


def test_latent_attention_is_refused(make_engine: MakeEngine) -> None:
    with pytest.raises(SettingsError, match="latent attention of DeepseekV3ForCausalLM"):
        make_engine(make_model("deepseek_v3"), load=False)


def test_rope_scaling_is_refused_by_name(tmp_path: Path) -> None:
    config = make_model().config.to_dict() | {
        "architectures": ["Qwen3ForCausalLM"],
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    }
    config.pop("rope_parameters", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SettingsError, match="yarn"):
        create_engine(
            "embedded",
            model_dir=tmp_path,
            dtype="float32",
            device="cpu",
            max_batch_size=1,
            num_threads=1,
            max_model_len=8,
        )
