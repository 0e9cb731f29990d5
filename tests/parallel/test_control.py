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
