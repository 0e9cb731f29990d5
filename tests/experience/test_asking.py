"""Rank 0 asks, the others wait for its word: what each gets, in order."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch.distributed import ProcessGroup

from tests.ranks import on_ranks, world_of_one
from xrl.experience.asking import Asked, Asking, Need
from xrl.launch.stop import StopAsked
from xrl.parallel.control import Control


@pytest.fixture(autouse=True, scope="module")
def world() -> Iterator[ProcessGroup]:
    with world_of_one() as found:
        yield found


def needing_weights(times: int, answer: str) -> Asking[str]:
    for _ in range(times):
        yield Need.WEIGHTS
    return answer


def test_what_is_needed_is_told_to_every_rank_and_the_answer_is_rank_0_s() -> None:
    def play(rank: int, group: ProcessGroup) -> list[str | Need]:
        asked: Asked[str] = Asked(Control(group, leads=rank == 0))
        return [asked.go_on(lambda: needing_weights(2, "done")) for _ in range(3)]

    assert on_ranks(2, play) == [[Need.WEIGHTS, Need.WEIGHTS, "done"], [Need.WEIGHTS, Need.WEIGHTS, Need.NOTHING]]


def test_the_next_question_begins_when_the_last_is_answered(world: ProcessGroup) -> None:
    begun = []

    def begin(name: str) -> Asking[str]:
        begun.append(name)
        return needing_weights(1, name)

    asked: Asked[str] = Asked(Control(world, leads=True))
    found = [
        asked.go_on(lambda: begin("first")),
        asked.go_on(lambda: begin("never")),
        asked.go_on(lambda: begin("second")),
    ]
    assert found == [Need.WEIGHTS, "first", Need.WEIGHTS]
    assert begun == ["first", "second"]


def test_an_error_is_rank_0_s_and_ends_the_question(world: ProcessGroup) -> None:
    def fails() -> Asking[str]:
        yield Need.WEIGHTS
        raise ValueError("no worker is left")

    asked: Asked[str] = Asked(Control(world, leads=True))
    assert asked.go_on(fails) is Need.WEIGHTS
    with pytest.raises(ValueError, match="no worker is left"):
        asked.go_on(fails)


def test_what_is_cut_off_ends_on_every_rank_and_the_next_question_begins_anew() -> None:
    def cut_off() -> Asking[str]:
        yield Need.WEIGHTS
        raise StopAsked("SIGUSR1")

    def play(rank: int, group: ProcessGroup) -> list[str | Need]:
        asked: Asked[str] = Asked(Control(group, leads=rank == 0))
        return [asked.go_on(cut_off), asked.go_on(cut_off), asked.go_on(lambda: needing_weights(0, "done"))]

    assert on_ranks(2, play) == [[Need.WEIGHTS, Need.STOP, "done"], [Need.WEIGHTS, Need.STOP, Need.NOTHING]]
