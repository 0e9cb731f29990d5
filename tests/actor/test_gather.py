"""Metrics of every rank on every rank."""

from __future__ import annotations

import math
from pathlib import Path

import torch.distributed as dist
import torch.multiprocessing as mp

from xrl.actor.gather import merge_over_ranks
from xrl.types import Mean

# Each rank has one that the other has not; sums must be the same to the bit.
METRICS = [
    {"loss": Mean(0.1, 3.0), "only/first": Mean(5e-324, 1.0), "computed_tokens": Mean(7, 1)},
    {"computed_tokens": Mean(8, 1), "loss": Mean(0.2, 1.0), "überall": Mean(-math.inf, 1e300)},
]
MERGED = {
    "loss": Mean(0.1 + 0.2, 4.0),
    "only/first": Mean(5e-324, 1.0),
    "computed_tokens": Mean(15.0, 2.0),
    "überall": Mean(-math.inf, 1e300),
}


def test_every_rank_gets_the_same_sums(tmp_path: Path) -> None:
    mp.spawn(_check, args=(str(tmp_path / "store"),), nprocs=2)


def _check(rank: int, store: str) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=2, store=dist.FileStore(store, 2))  # type: ignore[attr-defined]
    group = dist.group.WORLD
    assert group is not None
    found = merge_over_ranks(METRICS[rank], group)
    assert list(found.items()) == list(MERGED.items())
    assert math.isnan(merge_over_ranks({"loss": Mean(math.nan, 1.0)}, group)["loss"].value)
    assert merge_over_ranks({}, group) == {}
    dist.destroy_process_group()
