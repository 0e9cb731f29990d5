"""Samples of rank 0 on every rank, the same to the bit. Ranks are threads of this process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist
from torch.distributed import ProcessGroup

from tests.ranks import on_ranks, world_of_one
from tests.samples import sample
from xrl.actor.broadcast import broadcast_samples
from xrl.types import Sample

SAMPLES = [
    sample([4, 7], [11, 12, 13], advantage=0.1, group_id=4, logprobs=[-0.1, -1e-300, -5e5]),
    sample([4, 7], [14], advantage=-1 / 3, group_id=4),
    sample([9, 7, 8], [15, 16], advantage=0.0, group_id=9),
    sample([4, 7], [17], advantage=2.0, group_id=0),  # the same prompt as another group's
]


@pytest.fixture(autouse=True, scope="module")
def alone() -> Iterator[ProcessGroup]:
    with world_of_one() as world:
        yield world


def everywhere(samples: list[Sample], *, num_ranks: int) -> list[list[Sample]]:
    """What each rank gets."""
    return on_ranks(num_ranks, lambda rank, group: broadcast_samples(samples if rank == 0 else None, group))


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_every_rank_gets_the_samples_of_rank_0_in_their_order(num_ranks: int) -> None:
    assert everywhere(SAMPLES, num_ranks=num_ranks) == [SAMPLES] * num_ranks


def test_a_rank_that_is_alone_keeps_what_it_has(alone: ProcessGroup) -> None:
    found = broadcast_samples(SAMPLES, alone)
    assert found == SAMPLES and found is not SAMPLES


def test_no_samples_are_none_on_every_rank() -> None:
    assert everywhere([], num_ranks=2) == [[], []]


def test_an_answer_without_tokens_arrives_as_one() -> None:
    empty = [sample([4, 7], []), sample([4, 7], [3])]
    assert everywhere(empty, num_ranks=2) == [empty, empty]


def test_what_comes_next_is_not_mixed_up_with_what_came_before() -> None:
    def both(rank: int, group: ProcessGroup) -> list[list[Sample]]:
        return [broadcast_samples(part if rank == 0 else None, group) for part in (SAMPLES[:2], [], SAMPLES[2:])]

    assert on_ranks(2, both) == [[SAMPLES[:2], [], SAMPLES[2:]]] * 2


def test_a_prompt_travels_once_for_all_its_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [sample(range(1000), [3], group_id=1) for _ in range(5)]
    sizes: list[int] = []
    broadcast = dist.broadcast

    def measured(tensor, *args, **options):
        if options["group"].rank() == 0:
            sizes.append(tensor.numel())
        return broadcast(tensor, *args, **options)

    monkeypatch.setattr(dist, "broadcast", measured)
    assert everywhere(samples, num_ranks=2)[1] == samples
    assert 1000 <= sum(sizes) < 1100
