"""The contract of engines, kept by each of them; and that each check of it can fail."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.rollout import bigram_engine, contract
from tests.rollout.bigram_engine import BigramEngine
from tests.rollout.contract import Case
from tests.rollout.engines import buckets
from tests.tiny_models import make_checkpoint, make_model
from xrl.rollout import create_engine
from xrl.types import WeightBucket

MakeCase = Callable[[], Case]
# TurboMind runs in an environment of its own: test_turbomind.py runs this file there.
HAS_LMDEPLOY = importlib.util.find_spec("lmdeploy") is not None
ENGINES = ["turbomind"] if HAS_LMDEPLOY else ["embedded", "bigram"]

# Which check finds which fault.
FINDS = {
    "answers without weights": contract.nothing_is_answered_before_the_first_weights,
    "greedy answers vary": contract.greedy_answers_are_the_models_and_repeat,
    "log-probs of another temperature": contract.logprobs_are_the_models_at_the_sampling_temperature,
    "log-probs are of 64 bits": contract.answers_are_arrays_of_32_bits,
    "the second update is lost": contract.every_update_takes_effect,
    "the last tensor alone is updated": contract.every_update_takes_effect,
    "completions carry an old version": contract.every_update_takes_effect,
    "the stop token is left out": contract.a_stop_token_is_the_last_token_with_its_logprob,
    "all samples are one": contract.samples_and_seeds_differ_and_a_seed_repeats,
    "seeds are ignored": contract.samples_and_seeds_differ_and_a_seed_repeats,
    "all groups start at their first sample": contract.a_group_may_be_asked_for_in_parts,
    "sleep frees nothing": contract.sleep_frees_memory_and_wake_goes_on,
    "answers while asleep": contract.sleep_frees_memory_and_wake_goes_on,
    "wake brings other weights": contract.sleep_frees_memory_and_wake_goes_on,
    "an update while asleep is lost": contract.weights_may_be_dropped_for_sleep_and_come_while_it_lasts,
    "abort is ignored": contract.abort_returns_what_there_is_and_spares_the_others,
    "abort ends all": contract.abort_returns_what_there_is_and_spares_the_others,
    "the engine takes weights while it generates": contract.changes_of_state_are_refused_while_requests_run,
    "an unknown tensor is an error of Python": contract.wrong_tensors_are_refused_and_the_update_can_go_on,
    "an incomplete update is accepted": contract.wrong_tensors_are_refused_and_the_update_can_go_on,
    "tensors are used after load_part": contract.buckets_come_in_any_order_and_their_memory_is_used_again,
    "a request that cannot run is cut short": contract.requests_that_cannot_run_are_refused,
    "answers after close": contract.a_closed_engine_refuses,
}


class TransformersModel:
    """A tiny decoder whose weights bfloat16 can hold."""

    def __init__(self, seed: int) -> None:
        self.model = tiny_model(seed)

    def buckets(self, version: int) -> list[WeightBucket]:
        return buckets(self.model, version)

    def logits(self, token_ids: list[int]) -> Tensor:
        with torch.no_grad():
            return self.model(torch.tensor([token_ids])).logits[0]


class BigramModel:
    def __init__(self, seed: int) -> None:
        self.matrix = 2 * torch.randn(
            bigram_engine.VOCAB_SIZE, bigram_engine.VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)
        )

    def buckets(self, version: int) -> list[WeightBucket]:
        halves = {"embeddings": {"even": self.matrix[::2]}, "final": {"odd": self.matrix[1::2]}}
        return [WeightBucket(version=version, part=part, tensors=tensors) for part, tensors in halves.items()]

    def logits(self, token_ids: list[int]) -> Tensor:
        return self.matrix[token_ids]


def sizes(family: str = "qwen3") -> dict[str, Any]:
    """For tiny models that TurboMind has kernels for, and leaves nothing out of."""
    special: dict[str, dict[str, Any]] = {
        "qwen2": {"hidden_size": 256},
        "qwen3_moe": {"num_experts": 128, "num_hidden_layers": 1},
        "llama": {"attention_bias": False, "mlp_bias": False, "rope_parameters": {"rope_type": "default"}},
    }
    return {"num_hidden_layers": 2, "head_dim": 64} | special.get(family, {})


def tiny_model(seed: int, family: str = "qwen3", *, tied: bool = False) -> PreTrainedModel:
    model = make_model(family, seed=seed, tied=tied, **sizes(family))
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data.bfloat16())
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), tied=False, **sizes())


@pytest.fixture(scope="module", params=ENGINES)
def make_case(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[MakeCase]:
    """Makes cases of one engine after the other; all are closed afterwards."""
    cases: list[Case] = []

    def make() -> Case:
        cases.append(new_case(request.param, checkpoint))
        return cases[-1]

    yield make
    for case in cases:
        case.engine.close()


@pytest.fixture(scope="module")
def case(make_case: MakeCase) -> Case:
    return make_case()


def new_case(name: str, checkpoint: Path) -> Case:
    if name == "bigram":
        bigram = BigramEngine()
        return Case(bigram, BigramModel, memory=lambda: bigram.cache_bytes)
    engine = create_engine(
        name,
        model_dir=checkpoint,
        dtype="bfloat16" if name == "turbomind" else "float32",
        device="cuda:0" if name == "turbomind" else "cpu",
        max_batch_size=16,
        num_threads=1,
        max_model_len=256,
    )
    process = psutil.Process()

    def cache_bytes() -> float:
        cache = engine._scheduler.cache  # type: ignore[attr-defined]
        return cache.num_blocks * cache.bytes_per_block

    return Case(engine, TransformersModel, (lambda: process.memory_info().rss) if name == "turbomind" else cache_bytes)


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
def test_engine_keeps_the_contract(case: Case, check: Callable[[Case], None]) -> None:
    check(case)


@pytest.mark.parametrize("check", contract.ON_A_FRESH_ENGINE, ids=lambda check: check.__name__)
def test_fresh_engine_keeps_the_contract(make_case: MakeCase, check: Callable[[Case], None]) -> None:
    check(make_case())


@pytest.mark.skipif(HAS_LMDEPLOY, reason="is run beside the other engines")
@pytest.mark.parametrize("fault", bigram_engine.FAULTS)
def test_every_fault_is_found(fault: str) -> None:
    check, engine = FINDS[fault], BigramEngine(fault)
    with contextlib.closing(engine), pytest.raises((AssertionError, KeyError, pytest.fail.Exception)):
        check(Case(engine, BigramModel, memory=lambda: engine.cache_bytes))
