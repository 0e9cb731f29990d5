"""The process groups of this rank, made once and handed to whoever needs them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

from xrl.parallel.layout import Layout


@dataclass(frozen=True, kw_only=True)
class ParallelGroups:
    """Where this rank stands in the layout, and the groups it talks through."""

    layout: Layout
    device: torch.device
    rank: int
    tensor_rank: int
    pipeline_rank: int
    data_rank: int
    expert_rank: int
    tensor: ProcessGroup  # ranks that share this rank's layers
    pipeline: ProcessGroup  # the stages of this rank's replica
    data: ProcessGroup  # ranks that hold the same weights, but for those of experts
    expert: ProcessGroup  # those of them that together hold every expert
    control: ProcessGroup  # every rank, on gloo: batches and metrics travel on the host

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.layout.pipeline_size - 1

    @property
    def reports_losses(self) -> bool:
        """One rank a replica: the last stage holds the losses, and its tensor ranks all hold the same."""
        return self.is_last_stage and self.tensor_rank == 0
