"""What is trained in a parameter's place, of each kind of optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.actor.test_state import learn, make_actor
from tests.tiny_models import make_checkpoint
from xrl.actor.optimizer_state import trained_parameters
from xrl.checkpoint.pieces import MAIN, MOMENTS
from xrl.config import ParallelConfig
from xrl.parallel.groups import ParallelGroups
from xrl.parallel.megatron import initialize, shutdown


@pytest.fixture(scope="module")
def groups() -> Iterator[ParallelGroups]:
    yield initialize(ParallelConfig(), seed=1)
    shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), with_tokenizer=False)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_every_parameter_has_a_main_weight_and_after_an_update_two_moments(
    bf16: bool, model: Path, groups: ParallelGroups
) -> None:
    actor = make_actor(model, groups, bf16=bf16)
    found = trained_parameters(actor.model, actor.optimizer)
    assert set(found) == {name for name, _ in actor.model.named_parameters()}
    assert all(set(one.held().tensors) == {MAIN} and one.num_updates == 0 for one in found.values())
    learn(actor)
    for one in trained_parameters(actor.model, actor.optimizer).values():
        held = one.held()
        assert set(held.tensors) == {MAIN, *MOMENTS}
        assert {tensor.dtype for tensor in held.tensors.values()} == {torch.float32}
        assert {tuple(tensor.shape) for tensor in held.tensors.values()} == {(one.parameter.numel(),)}
        assert torch.equal(held.tensors[MAIN].to(one.parameter.dtype), one.parameter.detach().view(-1))
        assert one.num_updates == 1
        assert (held.tensors[MAIN].data_ptr() == one.parameter.data_ptr()) is not bf16
