"""Sends samples from rank 0: all sizes to every rank, the samples themselves to the replica that trains on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed import ProcessGroup

from xrl.data.packing import size_of
from xrl.parallel.groups import ParallelGroups
from xrl.types import Sample, SampleSize

# Arrays of a sample, of one value a token.
_ARRAYS = {
    "token_ids": np.int32,
    "trained": np.bool_,
    "rollout_logprobs": np.float32,
    "advantages": np.float32,
    "versions": np.int32,
}
_TAG = 0
_SIZES = [field.name for field in dataclasses.fields(SampleSize)]
_NOT_WHOLE = {"temperature"}


def broadcast_sizes(samples: Sequence[Sample] | None, group: ProcessGroup) -> list[SampleSize]:
    """Tell every rank the sizes of rank 0's samples; the others pass None. Collective."""
    sizes = [size_of(sample) for sample in samples or ()]
    if dist.get_world_size(group) == 1:
        return sizes
    count = torch.tensor([len(sizes)])
    dist.broadcast(count, group_src=0, group=group)
    if not count:
        return []
    # In fp64, which holds temperatures as they are and whole numbers up to 2^53.
    table = torch.empty(int(count), len(_SIZES), dtype=torch.float64)
    if sizes:
        table = torch.tensor([dataclasses.astuple(size) for size in sizes], dtype=torch.float64)
    dist.broadcast(table, group_src=0, group=group)
    return [_size(row) for row in table.tolist()]


def _size(row: Sequence[float]) -> SampleSize:
    values: dict[str, Any] = dict(zip(_SIZES, row, strict=True))
    return SampleSize(**{name: value if name in _NOT_WHOLE else int(value) for name, value in values.items()})


def send_samples(
    samples: Sequence[Sample] | None,
    sizes: Sequence[SampleSize],
    wanted: Sequence[Sequence[int]],
    groups: ParallelGroups,
) -> dict[int, Sample]:
    """Send each replica the samples of rank 0 that it wants; the others pass None. Collective.

    Args:
        sizes: of all samples.
        wanted: [replica] -> indices of samples.

    Returns:
        This replica's samples by their index, on each of its ranks.
    """
    own = wanted[groups.data_rank]
    if groups.rank != 0:
        return _received(sizes, own, groups.control)
    assert samples is not None
    for replica, indices in enumerate(wanted):
        ranks = [rank for rank in range(1, groups.layout.world_size) if groups.layout.place(rank).data == replica]
        if ranks and indices:
            _send([samples[index] for index in indices], ranks, groups.control)
    return {index: samples[index] for index in own}


def _send(samples: Sequence[Sample], ranks: Sequence[int], group: ProcessGroup) -> None:
    for name, dtype in _ARRAYS.items():
        parts: list[NDArray[Any]] = [getattr(sample, name) for sample in samples]
        array: NDArray[Any] = np.concatenate(parts).astype(dtype, copy=False)
        for work in [group.send([_bytes(array)], rank, _TAG) for rank in ranks]:
            work.wait()  # Unbounded: xrl.launch.watch misses a rank that hangs.


def _received(sizes: Sequence[SampleSize], own: Sequence[int], group: ProcessGroup) -> dict[int, Sample]:
    if not own:
        return {}
    lengths = [sizes[index].num_tokens for index in own]
    borders = np.cumsum(lengths)[:-1]
    parts = {}
    for name, dtype in _ARRAYS.items():
        array: NDArray[Any] = np.empty(sum(lengths), dtype)
        group.recv([_bytes(array)], 0, _TAG).wait()  # Unbounded: xrl.launch.watch misses a rank that hangs.
        parts[name] = np.split(array, borders)
    return {
        index: Sample(
            **{name: arrays[number] for name, arrays in parts.items()},
            prompt_length=sizes[index].prompt_length,
            group_id=sizes[index].group_id,
            episode_id=sizes[index].episode_id,
            temperature=sizes[index].temperature,
        )
        for number, index in enumerate(own)
    }


def _bytes(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(array.view(np.uint8))
