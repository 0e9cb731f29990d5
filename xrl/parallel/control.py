"""What rank 0 decides, on every rank."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from xrl.parallel.groups import ParallelGroups

C = TypeVar("C", bound=int)


class Control:
    """Rank 0 leads: it samples, judges and writes. The others wait for its word, and do their part."""

    def __init__(self, group: ProcessGroup, *, leads: bool) -> None:
        """
        Args:
            group: every rank, on gloo.
            leads: whether this is rank 0.
        """
        self.group = group
        self.leads = leads

    @classmethod
    def of(cls, groups: ParallelGroups) -> Control:
        """Of this rank."""
        return cls(groups.control, leads=groups.rank == 0)

    def agree(self, choice: C) -> C:
        """Rank 0's choice, on every rank: what the others pass counts for nothing but its type. Collective."""
        agreed = torch.tensor([int(choice)])
        dist.broadcast(agreed, group_src=0, group=self.group)
        return type(choice)(int(agreed))

    def any(self, is_so: bool) -> bool:
        """Whether it is so on at least one rank. Collective."""
        agreed = torch.tensor([int(is_so)])
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=self.group)
        return bool(agreed)

    def meet(self) -> None:
        """Wait until every rank is here. Collective."""
        dist.barrier(self.group)
