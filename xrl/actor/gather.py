"""Gives every rank the metrics of all, as text in tensors: torch's own `all_gather_object` runs what it receives."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from xrl.metrics.mean import merge
from xrl.types import Mean


def merge_over_ranks(metrics: Mapping[str, Mean], group: ProcessGroup) -> dict[str, Mean]:
    """Merge the metrics of all ranks, in the order of the ranks, so that every rank has the same sums. Collective.

    JSON gives a float back to the bit. Ranks may have different metrics: the last stage alone knows the losses.
    """
    mine = json.dumps({name: (float(mean.total), float(mean.count)) for name, mean in metrics.items()}).encode()
    num_ranks = dist.get_world_size(group)
    lengths = [torch.zeros(1, dtype=torch.long) for _ in range(num_ranks)]
    dist.all_gather(lengths, torch.tensor([len(mine)]), group=group)
    longest = max(int(length) for length in lengths)
    texts = [torch.empty(longest, dtype=torch.uint8) for _ in range(num_ranks)]
    dist.all_gather(texts, torch.tensor(list(mine.ljust(longest)), dtype=torch.uint8), group=group)
    merged: dict[str, Mean] = {}
    for text in texts:
        part = json.loads(bytes(text.tolist()))
        merged = merge(merged, {name: Mean(total, count) for name, (total, count) in part.items()})
    return merged
