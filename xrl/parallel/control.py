"""Tells every rank what rank 0 decides."""

from __future__ import annotations

import json
from typing import Any, TypeVar

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

    @property
    def rank(self) -> int:
        """This one's."""
        return dist.get_rank(self.group)

    @property
    def num_ranks(self) -> int:
        """All of them."""
        return dist.get_world_size(self.group)

    @classmethod
    def of(cls, groups: ParallelGroups) -> Control:
        """The control of this rank."""
        return cls(groups.control, leads=groups.rank == 0)

    def agree(self, choice: C) -> C:
        """Rank 0's choice, on every rank: what the others pass counts for nothing but its type. Collective."""
        agreed = torch.tensor([int(choice)])
        dist.broadcast(agreed, group_src=0, group=self.group)
        return type(choice)(int(agreed))

    def gather(self, value: Any) -> list[Any]:
        """What every rank passes, on every rank, in their order. Collective; see `gather`."""
        return gather(value, self.group)

    def any(self, is_so: bool) -> bool:
        """Whether it is so on at least one rank. Collective."""
        agreed = torch.tensor([int(is_so)])
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX, group=self.group)
        return bool(agreed)

    def meet(self) -> None:
        """Wait until every rank is here. Collective."""
        dist.barrier(self.group)


def gather(value: Any, group: ProcessGroup) -> list[Any]:
    """What every rank of a group passes, on every rank, in their order. Collective.

    Args:
        value: what JSON can say, floats to the bit; it travels as text in tensors, since torch's own
            `all_gather_object` runs what it receives.
    """
    mine = json.dumps(value).encode()
    lengths = [torch.zeros(1, dtype=torch.long) for _ in range(dist.get_world_size(group))]
    dist.all_gather(lengths, torch.tensor([len(mine)]), group=group)
    longest = max(int(length) for length in lengths)
    texts = [torch.empty(longest, dtype=torch.uint8) for _ in lengths]
    dist.all_gather(texts, torch.frombuffer(bytearray(mine.ljust(longest)), dtype=torch.uint8), group=group)
    return [json.loads(bytes(text.numpy())) for text in texts]
