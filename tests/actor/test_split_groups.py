"""How a rollout is cut into updates, and how samples travel to the other ranks."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist
import torch.multiprocessing as mp

from xrl.actor.broadcast import broadcast_samples
from xrl.actor.split import split_groups
from xrl.types import Sample


def sample(group_id: int, length: int) -> Sample:
    return Sample(
        prompt_ids=[group_id, 7],
        response_ids=list(range(length)),
        rollout_logprobs=[-0.1 * place for place in range(length)],
        advantage=group_id - 0.25,
        group_id=group_id,
    )


SAMPLES = [sample(4, 3), sample(4, 1), sample(9, 2), sample(11, 5), sample(11, 1)]


def test_groups_stay_whole_and_every_sample_is_in_one_update() -> None:
    parts = split_groups(SAMPLES, 2)
    assert [[s.group_id for s in part] for part in parts] == [[4, 4, 11, 11], [9]]


def test_fewer_groups_than_updates_give_fewer_updates() -> None:
    assert [len(part) for part in split_groups(SAMPLES, 8)] == [2, 1, 2]
    assert split_groups([], 3) == []


def test_every_rank_gets_the_samples_of_rank_0(tmp_path: Path) -> None:
    mp.spawn(_check_broadcast, args=(str(tmp_path / "store"),), nprocs=2)


def _check_broadcast(rank: int, store: str) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=2, store=dist.FileStore(store, 2))  # type: ignore[attr-defined]
    group = dist.group.WORLD
    assert group is not None
    for samples in (SAMPLES, []):
        assert broadcast_samples(samples if rank == 0 else None, group) == samples
    dist.destroy_process_group()
