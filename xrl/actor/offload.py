"""Moves what only training needs to the host while rollout engines use the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor


class TrainingMemory:
    """Gradients, main weights, optimizer state and the reference's weights; the model's own weights always stay.

    Gradients are worth nothing between updates: their memory is given back, on the CPU too. The rest goes to the host
    and comes back as it was.
    """

    def __init__(
        self, model: DistributedDataParallel, optimizer: MegatronOptimizer, reference: dict[str, Tensor] | None
    ) -> None:
        self._model, self._optimizer, self._reference = model, optimizer, reference or {}
        # Page-locked, used again and again; with what it is for, so that no other can have its id.
        self._host: dict[tuple[int, str], tuple[object, Tensor]] = {}
        self._away: list[_Offloaded] = []
        self.is_offloaded = False

    @torch.no_grad()
    def offload(self) -> None:
        """Move to the host; does nothing if it is there already."""
        if self.is_offloaded:
            return
        self.is_offloaded = True
        for buffer in self._grad_buffers():
            buffer.offload_to_cpu(move_params=False, move_grads=True)
        for holder, name, tensor in self._tensors():
            if tensor.device.type == "cpu":
                continue
            _, host = self._host.get((id(holder), name), (None, None))
            if host is None or host.shape != tensor.shape or host.dtype != tensor.dtype:
                host = torch.empty_like(tensor, device="cpu", pin_memory=True)
                self._host[id(holder), name] = holder, host
            host.copy_(tensor, non_blocking=True)
            self._away.append(_Offloaded(holder, name, host, tensor.device))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        for away in self._away:
            away.put(away.host)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @torch.no_grad()
    def restore(self) -> None:
        """Move back to the device; does nothing if nothing was moved away."""
        if not self.is_offloaded:
            return
        self.is_offloaded = False
        for buffer in self._grad_buffers():
            buffer.reload_from_cpu(move_params=False, move_grads=True)
        for away in self._away:
            away.put(away.host.to(away.device, non_blocking=True))
        self._away.clear()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def _grad_buffers(self) -> Iterator[Any]:
        yield from self._model.buffers + self._model.expert_parallel_buffers

    def _tensors(self) -> Iterator[tuple[object, str, Tensor]]:
        """(what holds it, under which name, tensor)"""
        own = {each.untyped_storage().data_ptr() for each in (*self._model.parameters(), *self._model.module.buffers())}
        for optimizer in getattr(self._optimizer, "chained_optimizers", [self._optimizer]):
            if optimizer.optimizer is None:  # a rank whose share is empty
                continue
            for group in optimizer.optimizer.param_groups:
                for parameter in group["params"]:
                    # In fp32 the optimizer works on the model's weights themselves.
                    if parameter.untyped_storage().data_ptr() not in own:
                        yield parameter, "", parameter.data
            for state in optimizer.optimizer.state.values():
                yield from ((state, name, value) for name, value in state.items() if isinstance(value, Tensor))
        yield from ((self._reference, name, tensor) for name, tensor in self._reference.items())


class _Offloaded:
    """Remembers where a tensor belongs that is on the host."""

    def __init__(self, holder: object, name: str, host: Tensor, device: torch.device) -> None:
        self.holder, self.name, self.host, self.device = holder, name, host, device

    def put(self, tensor: Tensor) -> None:
        if isinstance(self.holder, Tensor):
            self.holder.data = tensor
        else:
            self.holder[self.name] = tensor  # type: ignore[index]
