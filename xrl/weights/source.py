"""How the actor's weights are read out for the rollout engines: one type, two ways."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Protocol

from torch import Tensor

from xrl.kernels.native import native_module
from xrl.models.shape import ModelShape
from xrl.parallel.groups import ParallelGroups
from xrl.types import WeightBucket
from xrl.weights.shared_export import SharedExporter
from xrl.weights.transport.shared_memory import Sender


class HoldsWeights(Protocol):
    """A model that is spread over ranks."""

    @property
    def shape(self) -> ModelShape: ...

    def named_weights(self) -> Mapping[str, Tensor]:
        """This rank's weights, by their names in the GPTModel."""
        ...

    def weights(self, *, version: int) -> Iterator[WeightBucket]:
        """The weights, gathered on rank 0, part by part. Collective."""
        ...


class WeightSource:
    """The weights of a model as whole Hugging Face tensors: every rank runs `stream`, rank 0 gets them.

    Where all ranks and workers are on one host, each rank writes its share straight to where the workers read.
    Elsewhere the shares are gathered on rank 0.
    """

    def __init__(self, model: HoldsWeights, groups: ParallelGroups, *, transport: str, timeout_s: float) -> None:
        """
        Args:
            transport: how weights reach the workers, a row of the table in xrl/weights/transport.
            timeout_s: longest wait for another rank's share.
        """
        self._model = model
        self._shared = (
            SharedExporter(model.shape, groups, timeout_s=timeout_s) if can_share_memory(transport, groups) else None
        )

    def stream(self, memory: Sender | None, *, version: int) -> Iterator[WeightBucket]:
        """The current weights, part by part, on rank 0. Collective: run it to its end.

        Args:
            memory: where workers of this host read, which rank 0 passes if there is any; None on the others.
        """
        if self._shared is None:
            return self._model.weights(version=version)
        return self._shared.stream([self._model.named_weights()], memory, version=version)


def can_share_memory(transport: str, groups: ParallelGroups) -> bool:
    """Whether every rank can write its share where the workers read. The same on every rank."""
    is_one_host = int(os.environ.get("LOCAL_WORLD_SIZE", groups.layout.world_size)) == groups.layout.world_size
    return transport == "shared_memory" and groups.device.type == "cpu" and native_module() is not None and is_one_host
