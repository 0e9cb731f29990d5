"""What rank 0 decides, on every rank."""

from __future__ import annotations

import enum
from collections.abc import Iterator

import pytest
from torch.distributed import ProcessGroup

from tests.ranks import on_ranks, world_of_one
from xrl.parallel.control import Control


class Choice(enum.IntEnum):
    GO_ON = 0
    END = 1


@pytest.fixture(autouse=True, scope="module")
def world() -> Iterator[ProcessGroup]:
    with world_of_one() as found:
        yield found


def test_every_rank_gets_rank_0_s_choice_whatever_it_says_itself() -> None:
    def play(rank: int, group: ProcessGroup) -> tuple[Choice, bool]:
        control = Control(group, leads=rank == 0)
        return control.agree(Choice.END if rank == 0 else Choice.GO_ON), control.agree(rank == 0)

    assert on_ranks(3, play) == [(Choice.END, True)] * 3


@pytest.mark.parametrize("where", [(), (0,), (2,), (0, 1, 2)])
def test_what_is_so_on_one_rank_is_known_on_all(where: tuple[int, ...]) -> None:
    found = on_ranks(3, lambda rank, group: Control(group, leads=rank == 0).any(rank in where))
    assert found == [bool(where)] * 3
