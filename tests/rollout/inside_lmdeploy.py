"""Run by test_turbomind.py in LMDeploy's environment: the adapter in LMDeploy's real code, over the stand-in."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdeploy
import psutil
import pytest
import stand_in_decoder
import torch
from lmdeploy.serve.openai.protocol import UpdateParamsRequest
from lmdeploy.turbomind import TurboMind
from transformers import PreTrainedModel

from benchmarks import gpu_turbomind
from tests.rollout.engines import buckets, generate, push, request
from tests.rollout.test_contract import sizes, tiny_model
from tests.tiny_models import make_checkpoint
from xrl.config import SettingsError
from xrl.rollout import create_engine
from xrl.rollout.engine import EngineError, EngineNotReady
from xrl.rollout.turbomind import TurboMindEngine
from xrl.rollout.turbomind_driver import TurboMindDriver
from xrl.types import SamplingParams, WeightBucket

MakeEngine = Callable[..., TurboMindEngine]
PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture
def make_engine(tmp_path: Path) -> Iterator[MakeEngine]:
    engines: list[Any] = []

    def make(family: str = "qwen3", *, tied: bool = False) -> TurboMindEngine:
        make_checkpoint(tmp_path, family=family, tied=tied, **sizes(family))
        engines.append(
            create_engine(
                "turbomind",
                model_dir=tmp_path,
                dtype="bfloat16",
                device="cuda:0",
                max_batch_size=4,
                num_threads=1,
                max_model_len=128,
            )
        )
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def greedy(model: PreTrainedModel, num_tokens: int = 8) -> list[int]:
    ids = list(PROMPT)
    for _ in range(num_tokens):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


def answer(engine: TurboMindEngine) -> list[int]:
    return generate(engine, PROMPT, temperature=0, max_new_tokens=8)[0].token_ids.tolist()


# LMDeploy as it is, by hand.


def update_by_hand(turbomind: TurboMind, model: PreTrainedModel, *, mended: bool) -> None:
    done = turbomind.sleep(2)
    if inspect.isawaitable(done):
        asyncio.run(_wait_for(done))
    turbomind.wakeup(["weights"])
    if mended and hasattr(turbomind, "_export_iter"):
        del turbomind._export_iter
    parts = {bucket.part: dict(bucket.tensors) for bucket in buckets(model)}
    misc = parts.pop("embeddings") | parts.pop("final")
    for layer in parts.values():
        turbomind.update_params(UpdateParamsRequest(serialized_named_tensors=layer, finished=False))
    turbomind.update_params(UpdateParamsRequest(serialized_named_tensors=misc, finished=True))
    turbomind.wakeup(["kv_cache"])


async def _wait_for(done: Any) -> None:
    await done


@pytest.mark.parametrize("mended", [False, True])
def test_lmdeploy_loses_the_second_update_unless_mended(tmp_path: Path, mended: bool) -> None:
    make_checkpoint(tmp_path, tied=False, **sizes())
    config = lmdeploy.TurbomindEngineConfig(
        dtype="bfloat16", devices=[0], session_len=64, max_batch_size=4, enable_metrics=False
    )
    turbomind = TurboMind(str(tmp_path), engine_config=config)
    models = [tiny_model(seed) for seed in (1, 2)]
    taken = []
    for model in models:
        update_by_hand(turbomind, model, mended=mended)
        logits = stand_in_decoder.last_logits(turbomind.model_comm.weights, torch.tensor(PROMPT))
        with torch.no_grad():
            expected = model(torch.tensor([PROMPT])).logits[0, -1]
        taken.append(torch.allclose(logits, expected, atol=1e-4))
    assert taken == [True, mended]


def test_lmdeploy_keeps_the_cache_in_its_sleep(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, tied=False, **sizes())
    config = lmdeploy.TurbomindEngineConfig(
        dtype="bfloat16", devices=[0], session_len=64, max_batch_size=4, enable_metrics=False
    )
    turbomind = TurboMind(str(tmp_path), engine_config=config)
    update_by_hand(turbomind, tiny_model(1), mended=True)
    assert turbomind.model_comm.pool_holds_cache


# The adapter.


@pytest.mark.parametrize("keep_weights", [True, False])
def test_sleep_gives_the_cache_back(make_engine: MakeEngine, keep_weights: bool) -> None:
    engine = make_engine()
    assert not engine._driver._turbomind.model_comm.pool_holds_cache  # before the first update, too
    push(engine, tiny_model(1), 1)
    engine.sleep(keep_weights=keep_weights)
    assert not engine._driver._turbomind.model_comm.pool_holds_cache


def test_without_the_mend_the_second_update_is_refused(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    monkeypatch.setattr(TurboMindDriver, "_forget_export", lambda self: None)
    push(engine, tiny_model(1), 1)
    assert answer(engine) == greedy(tiny_model(1))
    with pytest.raises(EngineError, match="embeddings: TurboMind took none of its 1 tensors"):
        push(engine, tiny_model(2), 2)
    with pytest.raises(EngineNotReady, match="version 2 is not finished"):
        answer(engine)


@pytest.mark.parametrize(
    ("family", "tied"),
    [
        ("qwen3", True),
        ("qwen2", False),
        ("qwen2", True),
        ("llama", False),
        ("mistral", False),
        ("qwen3_moe", False),
    ],
)
def test_updates_take_effect_in_every_family(make_engine: MakeEngine, family: str, tied: bool) -> None:
    engine = make_engine(family, tied=tied)
    for version in (1, 2):
        model = tiny_model(version, family, tied=tied)
        push(engine, model, version)
        assert answer(engine) == greedy(model)


def test_a_part_may_come_twice_and_the_last_one_counts(make_engine: MakeEngine) -> None:
    engine, model = make_engine(), tiny_model(1)
    for bucket in buckets(model, 1):
        wrong = {name: torch.full_like(tensor, 7.0) for name, tensor in bucket.tensors.items()}
        engine.load_part(WeightBucket(version=1, part=bucket.part, tensors=wrong))
        engine.load_part(bucket)
    engine.finish_update(1)
    assert answer(engine) == greedy(model)


def test_an_update_that_turbomind_fails_at_begins_anew(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, model = make_engine(), tiny_model(1)
    first, second, *_ = buckets(model, 1)
    engine.load_part(first)
    with monkeypatch.context() as patch:
        patch.setattr("lmdeploy.turbomind.deploy.module.permute_v2", lambda *_: 1 / 0)
        with pytest.raises(EngineError, match=r"layers\.0: TurboMind failed: ZeroDivisionError"):
            engine.load_part(second)
    engine.load_part(second)
    with pytest.raises(EngineError, match=r"missing lm_head\.weight, model\.embed_tokens\.weight"):
        engine.finish_update(1)
    push(engine, model, 1)
    assert answer(engine) == greedy(model)


def test_an_abandoned_update_leaves_nothing_to_the_next(make_engine: MakeEngine) -> None:
    engine = make_engine()
    push(engine, tiny_model(1), 1)
    for bucket in buckets(tiny_model(2), 2)[:2]:
        engine.load_part(bucket)
    push(engine, tiny_model(3), 3)
    assert answer(engine) == greedy(tiny_model(3))


def test_an_update_may_come_while_the_weights_are_on_the_host(make_engine: MakeEngine) -> None:
    engine = make_engine()
    push(engine, tiny_model(1), 1)
    engine.sleep()
    assert not engine._driver._turbomind.model_comm.weights.tensors
    push(engine, tiny_model(2), 2)
    engine.wake()
    assert answer(engine) == greedy(tiny_model(2))


def test_experts_cannot_stay_while_the_engine_sleeps(make_engine: MakeEngine) -> None:
    engine = make_engine("qwen3_moe")
    push(engine, tiny_model(1, "qwen3_moe"), 1)
    with pytest.raises(EngineError, match="sleep with keep_weights=False"):
        engine.sleep()
    assert answer(engine) == greedy(tiny_model(1, "qwen3_moe"))
    engine.sleep(keep_weights=False)
    push(engine, tiny_model(2, "qwen3_moe"), 2)
    engine.wake()
    assert answer(engine) == greedy(tiny_model(2, "qwen3_moe"))


def test_weights_dropped_for_sleep_must_come_again(make_engine: MakeEngine) -> None:
    engine = make_engine()
    push(engine, tiny_model(1), 1)
    engine.sleep(keep_weights=False)
    engine.sleep(keep_weights=False)
    engine.wake()
    with pytest.raises(EngineNotReady, match="an update must come first"):
        answer(engine)
    push(engine, tiny_model(2), 2)
    assert answer(engine) == greedy(tiny_model(2))


def test_nothing_is_held_between_start_and_first_update_nor_of_the_last_one(make_engine: MakeEngine) -> None:
    engine = make_engine()
    turbomind = engine._driver._turbomind
    assert turbomind.model_comm.engine is None
    assert not turbomind.model_comm.weights.tensors
    push(engine, tiny_model(1), 1)
    assert not turbomind._tm_model.tm_params
    assert not hasattr(turbomind, "_export_iter")


def test_every_sampling_field_is_set(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, seen = make_engine(), []
    real = lmdeploy.GenerationConfig
    monkeypatch.setattr(lmdeploy, "GenerationConfig", lambda **fields: seen.append(fields) or real(**fields))
    sampling = SamplingParams(temperature=0.7, top_k=5, top_p=0.9, max_new_tokens=11, stop_token_ids=(4, 2))
    config = engine._driver.generation_config(sampling, seed=3)
    assert set(seen[0]) == {field.name for field in dataclasses.fields(real)}
    assert (config.temperature, config.top_k, config.top_p, config.min_p) == (0.7, 5, 0.9, 0.0)
    assert (config.max_new_tokens, config.stop_token_ids, config.ignore_eos) == (11, [4, 2], False)
    assert (config.random_seed, config.do_sample, config.logprobs) == (3, True, 1)
    free = engine._driver.generation_config(dataclasses.replace(sampling, stop_token_ids=()), seed=3)
    assert free.ignore_eos and free.stop_token_ids is None


def test_logprobs_are_those_of_the_filtered_distribution(make_engine: MakeEngine) -> None:
    engine, model = make_engine(), tiny_model(1)
    push(engine, model, 1)
    for completion in generate(engine, PROMPT, num_samples=3, temperature=0.8, top_k=4, max_new_tokens=8):
        with torch.no_grad():
            logits = (
                model(torch.tensor([[*PROMPT, *completion.token_ids.tolist()]])).logits[0, len(PROMPT) - 1 : -1] / 0.8
            )
        values, tokens = logits.topk(4)
        for row, token, logprob in zip(range(8), completion.token_ids, completion.logprobs, strict=True):
            place = tokens[row].tolist().index(token)
            assert abs(values[row].log_softmax(-1)[place] - logprob) < 1e-4
    (likeliest,) = generate(engine, PROMPT, temperature=0)
    assert likeliest.logprobs.tolist() == [0.0] * 16  # TurboMind's greedy distribution is certain


def test_more_samples_than_run_at_once_wait_their_turn(make_engine: MakeEngine) -> None:
    engine = make_engine()
    push(engine, tiny_model(1), 1)
    futures = [engine.submit(request([place, 9], id=str(place), num_samples=5, seed=place)) for place in range(3)]
    for future in futures:
        completions = future.result(timeout=60)
        assert len({tuple(completion.token_ids) for completion in completions}) == 5


def test_an_aborted_request_that_waits_comes_back_empty(make_engine: MakeEngine) -> None:
    engine = make_engine()
    push(engine, tiny_model(1), 1)
    running = engine.submit(request(PROMPT, id="running", num_samples=4, max_new_tokens=100))
    waiting = engine.submit(request(PROMPT, id="waiting", num_samples=4, max_new_tokens=100))
    engine.abort("waiting")
    engine.abort("running")
    for future in (running, waiting):
        completions = future.result(timeout=60)
        assert {completion.finish_reason for completion in completions} == {"abort"}
        assert all(len(completion.token_ids) == len(completion.logprobs) < 100 for completion in completions)


def test_errors_of_turbomind_are_the_engines(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    push(engine, tiny_model(1), 1)
    monkeypatch.setattr(stand_in_decoder, "candidates", lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
    with pytest.raises(EngineError, match="TurboMind ended the request with INTERNAL_ENGINE_ERROR"):
        generate(engine, PROMPT, num_samples=2)
    monkeypatch.undo()
    assert answer(engine) == greedy(tiny_model(1))


def test_a_checkpoint_that_cannot_be_loaded_is_refused(make_engine: MakeEngine, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, tied=False, **sizes())
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(SettingsError, match="TurboMind cannot load it: RuntimeError"):
        create_engine(
            "turbomind",
            model_dir=tmp_path,
            dtype="bfloat16",
            device="cuda:0",
            max_batch_size=4,
            num_threads=1,
            max_model_len=128,
        )


# The benchmark of a GPU, on the stand-in.


def run_benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(gpu_turbomind, "DEVICE", "cpu")
    process = psutil.Process()
    shape = {"vocab_size": 98, "initializer_range": 0.3, "max_position_embeddings": 512, **sizes()}
    load = gpu_turbomind.Load(num_prompts=2, answer_length=8, num_requests=4, request_length=8)
    return gpu_turbomind.prove(shape, load, used=lambda: process.memory_info().rss / 2**30)


def test_the_benchmark_finds_nothing_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    report = run_benchmark(monkeypatch)
    assert report.wrong == []
    assert report.figures["update_2"]["greedy_agreement"] == 1
    assert report.figures["update_2"]["logprob_largest_difference"] < 1e-4


def test_the_benchmark_notices_weights_that_are_not_the_actors(monkeypatch: pytest.MonkeyPatch) -> None:
    take = TurboMindDriver.take

    def swap_norms(driver: TurboMindDriver, part: str, tensors: dict[str, torch.Tensor], **options: Any) -> None:
        names = [name for name in tensors if name.endswith("layernorm.weight")]
        take(
            driver,
            part,
            tensors | dict(zip(names, (tensors[name] for name in reversed(names)), strict=True)),
            **options,
        )

    monkeypatch.setattr(TurboMindDriver, "take", swap_norms)
    assert "update 1: log-probs are the actor's, but for the rounding of bf16" in run_benchmark(monkeypatch).wrong
