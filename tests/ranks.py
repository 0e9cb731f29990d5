"""Ranks without processes: groups that are numbers alone, a world of one, and threads that play ranks over gloo."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup, distributed_c10d

from xrl.parallel.groups import ParallelGroups
from xrl.parallel.layout import Layout

T = TypeVar("T")
# Of a collective whose other ranks have failed: only a failing test waits for it.
TIMEOUT = timedelta(seconds=60)


def layout(*, tensor: int = 1, pipeline: int = 1, data: int = 1) -> Layout:
    return Layout(tensor_size=tensor, pipeline_size=pipeline, data_size=data)


def groups(ranks: Layout | None = None, *, rank: int = 0, control: ProcessGroup | None = None) -> ParallelGroups:
    """Where a rank stands in a layout, default: alone. Of its groups there is only the one that is given."""
    ranks = layout() if ranks is None else ranks
    place = ranks.place(rank)
    none: Any = None
    return ParallelGroups(
        layout=ranks,
        device=torch.device("cpu"),
        rank=rank,
        tensor_rank=place.tensor,
        pipeline_rank=place.pipeline,
        data_rank=place.data,
        expert_rank=place.expert,
        tensor=none,
        pipeline=none,
        data=none,
        expert=none,
        control=control or none,
    )


@contextlib.contextmanager
def world_of_one() -> Iterator[ProcessGroup]:
    """torch.distributed with this process alone, for as long as the block takes."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore(), timeout=TIMEOUT)  # type: ignore[attr-defined]
    try:
        world = dist.group.WORLD
        assert world is not None
        yield world
    finally:
        dist.destroy_process_group()


def on_ranks(num_ranks: int, action: Callable[[int, ProcessGroup], T]) -> list[T]:
    """What `action(rank, group)` gives on each of so many ranks: threads, each with its end of one gloo group.

    Within `world_of_one`, of which every thread is rank 0 to torch; each has its own rank in the group.

    Raises:
        BaseException: what the first rank that failed has raised.
    """
    store = dist.HashStore()  # type: ignore[attr-defined, unused-ignore]
    results: list[Any] = [None] * num_ranks
    errors: list[BaseException] = []
    ends: list[ProcessGroup] = []  # all of them until all ranks are done: others may still be in the last collective

    def play(rank: int) -> None:
        try:
            gloo: Any = dist.ProcessGroupGloo  # type: ignore[attr-defined, unused-ignore]
            options = gloo._Options()
            options._devices = [gloo.create_device(hostname="127.0.0.1")]
            options._timeout = TIMEOUT
            end = gloo(store, rank, num_ranks, options)
            distributed_c10d._world.pg_group_ranks[end] = {0: rank}
            ends.append(end)
            results[rank] = action(rank, end)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=play, args=(rank,), name=f"rank-{rank}") for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for end in ends:
        distributed_c10d._world.pg_group_ranks.pop(end)
    if errors:
        raise errors[0]
    return results
