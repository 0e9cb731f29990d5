"""What leaves the device between updates comes back as it was."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from xrl.actor.offload import TrainingMemory


class GradBuffer:
    """As megatron-core's, whose gradients share one storage."""

    def __init__(self, numel: int, device: str) -> None:
        self.grad_data = torch.ones(numel, device=device)
        self._size = 0

    def offload_to_cpu(self, *, move_params: bool, move_grads: bool) -> None:
        assert move_grads and not move_params
        self._size = self.grad_data.untyped_storage().size()
        self.grad_data.untyped_storage().resize_(0)

    def reload_from_cpu(self, *, move_params: bool, move_grads: bool) -> None:
        assert move_grads and not move_params
        self.grad_data.untyped_storage().resize_(self._size)
        self.grad_data.zero_()


class Case:
    """A model in bf16 with fp32 main weights, or in fp32 without, after an update with AdamW."""

    def __init__(self, *, dtype: torch.dtype, device: str, sizes: tuple[int, ...] = (300, 200)) -> None:
        torch.manual_seed(0)
        self.module = nn.Linear(*sizes, device=device, dtype=dtype)
        weights = list(self.module.parameters())
        self.main = weights if dtype == torch.float32 else [nn.Parameter(each.detach().float()) for each in weights]
        self.optimizer = torch.optim.AdamW(self.main, lr=1e-2)
        self.buffer = GradBuffer(1000, device)
        self.reference: dict[str, Tensor] = {"weight": torch.randn(50, 50, device=device)}
        chained = [SimpleNamespace(optimizer=self.optimizer), SimpleNamespace(optimizer=None)]
        ddp: Any = SimpleNamespace(
            buffers=[self.buffer],
            expert_parallel_buffers=[],
            module=self.module,
            parameters=self.module.parameters,
        )
        wrapped: Any = SimpleNamespace(chained_optimizers=chained)
        self.memory = TrainingMemory(ddp, wrapped, self.reference)

    def update(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for weight in self.main:
            weight.grad = torch.randn(weight.shape, generator=generator).to(weight.device)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def tensors(self) -> list[Tensor]:
        """Everything that must come back."""
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        return [*self.main, *states, *self.module.parameters(), *self.reference.values()]


def check(case: Case, *, moves_main: bool, device: str) -> None:
    other = Case(dtype=case.module.weight.dtype, device=device)
    for seed in range(3):
        case.update(seed)
        other.update(seed)
        before = [tensor.clone() for tensor in case.tensors()]
        case.memory.offload()
        case.memory.offload()  # once is enough
        assert case.memory.is_offloaded
        assert case.buffer.grad_data.untyped_storage().size() == 0
        assert all(weight.device.type == torch.device(device).type for weight in case.module.parameters())
        expected = "cpu" if moves_main else torch.device(device).type
        assert {weight.device.type for weight in case.main} == {expected}
        assert {tensor.device.type for tensor in case.reference.values()} == {"cpu"}
        case.memory.restore()
        case.memory.restore()
        assert not case.memory.is_offloaded
        assert not case.buffer.grad_data.any()
        for tensor, was in zip(case.tensors(), before, strict=True):
            assert tensor.device == was.device
            assert torch.equal(tensor, was)
    for tensor, same in zip(case.tensors(), other.tensors(), strict=True):
        assert torch.equal(tensor, same)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_the_cpu_gradients_alone_are_given_back(dtype: torch.dtype) -> None:
    check(Case(dtype=dtype, device="cpu"), moves_main=True, device="cpu")


def test_before_the_first_update_there_is_no_state_yet() -> None:
    case = Case(dtype=torch.bfloat16, device="cpu")
    case.memory.offload()
    case.memory.restore()
    case.update(0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu_everything_but_the_models_weights_leaves(dtype: torch.dtype) -> None:
    # In fp32 the optimizer works on the model's own weights, which stay.
    case = Case(dtype=dtype, device="cuda")
    check(case, moves_main=dtype != torch.float32, device="cuda")
    case.update(3)
    before = torch.cuda.memory_allocated()
    case.memory.offload()
    states = 2 * sum(weight.nbytes for weight in case.main)
    main = sum(weight.nbytes for weight in case.main) if dtype != torch.float32 else 0
    gone = states + main + 4 * 1000 + case.reference["weight"].nbytes
    assert before - torch.cuda.memory_allocated() >= gone
