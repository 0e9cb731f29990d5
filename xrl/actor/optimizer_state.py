"""What megatron-core's optimizers keep of each parameter, whichever of them it is: read, and put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor, nn

from xrl.checkpoint.pieces import MAIN, MOMENTS, HeldParameter

_STEP = "step"


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainedParameter:
    """A parameter of the model, and what an optimizer trains in its place."""

    name: str
    parameter: Tensor
    main: Tensor  # its elements [start, stop) at the precision that is trained: those themselves in fp32, else a copy
    start: int
    stop: int
    is_shard: bool  # the other replicas train its other elements
    optimizer: torch.optim.Optimizer

    def held(self) -> HeldParameter:
        """Views of what there is of it; without moments before its first update."""
        moments = {kind: self._state[kind].view(-1) for kind in MOMENTS if kind in self._state}
        return HeldParameter(
            name=self.name,
            start=self.start,
            stop=self.stop,
            tensors={MAIN: self.main.detach().view(-1), **moments},
            is_shard=self.is_shard,
        )

    @property
    def num_updates(self) -> int:
        """Adam's count for it."""
        if _STEP in self._state:
            return int(self._state[_STEP])
        # Fused optimizers (Apex, transformer-engine) count in the group.
        return int(self._group.get(_STEP, 0)) if self._state else 0

    @torch.no_grad()
    def put_back(self, main: Tensor, moments: Mapping[str, Tensor], *, num_updates: int) -> None:
        """Take saved values.

        Args:
            main: [numel] all of the parameter.
            moments: [stop - start] of this rank's share; none where there were no updates.
        """
        self.parameter.view(-1).copy_(main)
        self.main.detach().view(-1).copy_(main[self.start : self.stop])
        if not num_updates:
            return
        state: dict[str, Any] = self.optimizer.state[self.main]
        for kind in MOMENTS:
            state[kind] = torch.empty_like(self.main, dtype=torch.float32, memory_format=torch.contiguous_format)
            state[kind].view(-1).copy_(moments[kind])
        if isinstance(self.optimizer, torch.optim.Adam | torch.optim.AdamW):
            state[_STEP] = torch.tensor(float(num_updates))  # one of its own: each counts its own up
        else:
            self._group[_STEP] = num_updates

    @property
    def _state(self) -> Mapping[str, Any]:
        return self.optimizer.state.get(self.main, {})

    @property
    def _group(self) -> dict[str, Any]:
        groups = self.optimizer.param_groups
        return next(group for group in groups if any(each is self.main for each in group["params"]))


def trained_parameters(model: nn.Module, optimizer: MegatronOptimizer) -> dict[str, TrainedParameter]:
    """Everything that this rank trains, by its name in the model."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    found = {}
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        if inner.optimizer is None:  # this rank's share is empty
            continue
        for parameter, main, start, stop in _pairs(inner):
            name = names[parameter]
            found[name] = TrainedParameter(
                name=name,
                parameter=parameter,
                main=main,
                start=start,
                stop=stop,
                is_shard=_is_distributed(inner),
                optimizer=inner.optimizer,
            )
    return found


def _is_distributed(inner: Any) -> bool:
    """Whether it is megatron-core's distributed optimizer."""
    return hasattr(inner, "model_param_group_index_map")


def _pairs(inner: Any) -> Iterator[tuple[Tensor, Tensor, int, int]]:
    """(parameter, what is trained in its place, start, stop)"""
    if _is_distributed(inner):
        for parameter, (group, place) in inner.model_param_group_index_map.items():
            share = inner._get_model_param_range_map(parameter)["param"]
            yield parameter, inner.optimizer.param_groups[group]["params"][place], share.start, share.end
    elif hasattr(inner, "fp32_from_float16_groups"):
        halves = zip(chain(*inner.float16_groups), chain(*inner.fp32_from_float16_groups), strict=True)
        wholes = ((parameter, parameter) for parameter in chain(*inner.fp32_from_fp32_groups))
        for parameter, main in chain(halves, wholes):
            yield parameter, main, 0, parameter.numel()
    else:
        for parameter in chain(*(group["params"] for group in inner.optimizer.param_groups)):
            yield parameter, parameter, 0, parameter.numel()
