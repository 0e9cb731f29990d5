"""What is trained goes to a file and comes back: the next update is the same, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.actor.test_actor import SAMPLES
from tests.checkpoint.states import manifest
from tests.tiny_models import make_checkpoint
from xrl.parallel.cpu import prepare_megatron_for_cpu

prepare_megatron_for_cpu()

from xrl.actor.actor import Actor  # noqa: E402
from xrl.actor.state import ActorState  # noqa: E402
from xrl.algorithms.grpo import GRPO  # noqa: E402
from xrl.checkpoint.choose import SavedState  # noqa: E402
from xrl.checkpoint.writer import LeadPart, Saved, StateWriter  # noqa: E402
from xrl.config import AlgorithmConfig, ModelConfig, OptimizerConfig, PackingConfig, ParallelConfig  # noqa: E402
from xrl.parallel.control import Control  # noqa: E402
from xrl.parallel.groups import ParallelGroups  # noqa: E402
from xrl.parallel.megatron import initialize, shutdown  # noqa: E402


@pytest.fixture(scope="module")
def groups() -> Iterator[ParallelGroups]:
    yield initialize(ParallelConfig(), seed=1)
    shutdown()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        # A router's bias is a buffer: it is held, and not trained.
        family: make_checkpoint(folder / family, family=family, with_tokenizer=False)
        for family in ("qwen3", "deepseek_v3")
    }


def make_actor(model: Path, groups: ParallelGroups, *, bf16: bool, lr: float = 1e-3) -> Actor:
    return Actor(
        model=ModelConfig(model=model, bf16=bf16),
        parallel=ParallelConfig(),
        optimizer=OptimizerConfig(lr=lr, adam_eps=1e-6, lr_warmup_iters=4, weight_decay=0.01),
        packing=PackingConfig(),
        groups=groups,
        num_updates=10,
    )


def learn(actor: Actor) -> Any:
    (report,) = actor.learn(SAMPLES, GRPO(AlgorithmConfig(old_logprobs="rollout")))
    return report


def save(actor: Actor, folder: Path) -> SavedState:
    state = ActorState(actor)
    writer = StateWriter(folder, Control.of(actor.groups), file_name=state.file_name, keep=1)
    said = manifest(1, cut=state.cut, num_updates=state.num_updates, schedule=state.schedule())
    assert writer.begin(1, state.pieces(), LeadPart(manifest=said, arrays={})) is None
    saved = writer.settle(wait=True)
    assert isinstance(saved, Saved)
    return SavedState.at(saved.folder)


def weights(actor: Actor) -> dict[str, Tensor]:
    return {name: tensor.clone() for each in actor.weights(version=1) for name, tensor in each.tensors.items()}


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["qwen3", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_the_update_behind_a_saved_state_is_the_one_that_would_have_come(
    family: str, bf16: bool, models: dict[str, Path], groups: ParallelGroups, tmp_path: Path
) -> None:
    straight = make_actor(models[family], groups, bf16=bf16)
    for _ in range(2):
        learn(straight)
    saved = save(straight, tmp_path)
    assert saved.manifest.num_updates == 2
    other = make_actor(models[family], groups, bf16=bf16)
    ActorState(other).load(saved)
    assert ActorState(other).num_updates == 2
    for _ in range(2):
        one, two = learn(straight), learn(other)
        assert (one.lr, one.grad_norm, one.metrics) == (two.lr, two.grad_norm, two.metrics)
    expected, found = weights(straight), weights(other)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_state_from_before_the_first_update_has_no_moments(
    models: dict[str, Path], groups: ParallelGroups, tmp_path: Path
) -> None:
    straight = make_actor(models["qwen3"], groups, bf16=False)
    saved = save(straight, tmp_path)
    assert saved.manifest.num_updates == 0
    assert not any("exp_avg" in name for name in ActorState(straight).pieces())
    other = make_actor(models["qwen3"], groups, bf16=False)
    ActorState(other).load(saved)
    assert learn(straight).grad_norm == learn(other).grad_norm
    expected, found = weights(straight), weights(other)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_each_parameter_counts_its_own_updates(models: dict[str, Path], groups: ParallelGroups, tmp_path: Path) -> None:
    actor = make_actor(models["qwen3"], groups, bf16=False)
    learn(actor)
    ActorState(actor).load(save(actor, tmp_path))
    learn(actor)
    assert ActorState(actor).num_updates == 2, "and not one for each parameter"
