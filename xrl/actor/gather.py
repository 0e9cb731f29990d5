"""Gives every rank the metrics of all."""

from __future__ import annotations

from collections.abc import Mapping

from torch.distributed import ProcessGroup

from xrl.metrics.mean import merge
from xrl.parallel.control import gather
from xrl.types import Mean


def merge_over_ranks(metrics: Mapping[str, Mean], group: ProcessGroup) -> dict[str, Mean]:
    """Merge the metrics of all ranks, in the order of the ranks, so that every rank has the same sums. Collective.

    JSON gives a float back to the bit. Ranks may have different metrics: the last stage alone knows the losses.
    """
    mine = {name: (float(mean.total), float(mean.count)) for name, mean in metrics.items()}
    merged: dict[str, Mean] = {}
    for part in gather(mine, group):
        merged = merge(merged, {name: Mean(total, count) for name, (total, count) in part.items()})
    return merged
