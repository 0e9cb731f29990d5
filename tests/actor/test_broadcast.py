"""Samples of rank 0 on the replicas that train on them, the same to the bit. Ranks are threads of this process."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from torch.distributed import ProcessGroup

from tests.ranks import groups, layout, on_ranks, world_of_one
from tests.samples import contents, sample
from xrl.actor.broadcast import broadcast_sizes, send_samples
from xrl.data.packing import size_of
from xrl.parallel.layout import Layout
from xrl.types import Sample

SAMPLES = [
    sample([4, 7], [11, 12, 13], advantage=0.1, group_id=4, logprobs=[-0.1, -1e-300, -5e5]),
    sample([4, 7], [14], advantage=-1 / 3, group_id=4, temperature=0.7),
    dataclasses.replace(sample([9, 7, 8], [15, 16], group_id=9), trained=np.array([0, 0, 0, 0, 1], np.bool_)),
    sample([4, 7], [17], advantage=2.0, group_id=0),  # the same prompt as another group's
]


@pytest.fixture(autouse=True, scope="module")
def alone() -> Iterator[ProcessGroup]:
    with world_of_one() as world:
        yield world


def sent(ranks: Layout, *rounds: tuple[Sequence[Sample], Sequence[Sequence[int]]]) -> list[list[dict[int, Any]]]:
    """[rank][round] -> contents of the samples that a rank gets, by index."""

    def play(rank: int, group: ProcessGroup) -> list[dict[int, Any]]:
        found = []
        for samples, wanted in rounds:
            own = samples if rank == 0 else None
            sizes = broadcast_sizes(own, group)
            assert sizes == [size_of(each) for each in samples]
            found.append(send_samples(own, sizes, wanted, groups(ranks, rank=rank, control=group)))
        return [{index: contents(each) for index, each in samples.items()} for samples in found]

    return on_ranks(ranks.world_size, play)


def picked(*indices: int) -> dict[int, Any]:
    return {index: contents(SAMPLES[index]) for index in indices}


def test_each_replica_gets_what_it_wants_in_that_order() -> None:
    for rank, (found,) in enumerate(sent(layout(data=3), (SAMPLES, [[1, 0], [2], [3, 2]]))):
        assert found == (picked(1, 0), picked(2), picked(3, 2))[rank]
        assert list(found) == ([1, 0], [2], [3, 2])[rank]


def test_all_ranks_of_a_replica_get_the_same() -> None:
    ranks = layout(tensor=2, pipeline=2, data=2)
    found = sent(ranks, (SAMPLES, [[0, 2], [1, 3]]))
    for rank in range(8):
        assert found[rank] == [picked(*([0, 2] if ranks.place(rank).data == 0 else [1, 3]))]


def test_a_replica_that_wants_nothing_gets_nothing() -> None:
    assert sent(layout(data=2), (SAMPLES, [[0, 1, 2, 3], []])) == [[picked(0, 1, 2, 3)], [{}]]


def test_no_samples_are_none_on_every_rank() -> None:
    assert sent(layout(data=2), ([], [[], []])) == [[{}], [{}]]


def test_what_comes_next_is_not_mixed_up_with_what_came_before() -> None:
    rounds = [(SAMPLES, [[0], [1, 2]]), ([], [[], []]), (SAMPLES, [[], [3]])]
    assert sent(layout(data=2), *rounds)[1] == [picked(1, 2), {}, picked(3)]


def test_a_rank_that_is_alone_keeps_what_it_has(alone: ProcessGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "broadcast", None)
    monkeypatch.setattr(dist, "isend", None)
    found = send_samples(SAMPLES, broadcast_sizes(SAMPLES, alone), [[2, 0]], groups(control=alone))
    assert list(found) == [2, 0] and found[2] is SAMPLES[2] and found[0] is SAMPLES[0]
