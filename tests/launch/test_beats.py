"""Ranks that are missed, by the clock alone."""

from __future__ import annotations

import dataclasses
import json

import pytest

from xrl.launch.beats import Beat, World, numbers
from xrl.launch.limits import Limits
from xrl.launch.progress import PhaseKind

PHASES: dict[PhaseKind, float] = {
    "start": 600.0,
    "rollout": 600.0,
    "update": 200.0,
    "publish": 200.0,
    "save": 900.0,
    "evaluation": 600.0,
}
LIMITS = Limits(silence_s=60.0, phases=PHASES)


BAD_KIND = json.dumps(
    {"number": 1, "host": "a", "pid": 1, "phase": "b", "kind": "c", "phase_s": 1, "pieces": 1, "overdue_s": 0}
)


def beat(number: int, phase: str = "update 3", kind: PhaseKind = "update", pieces: int = 0) -> Beat:
    return Beat(number=number, host="node1", pid=7, phase=phase, kind=kind, phase_s=1.0, pieces=pieces)


def world(*ranks: int) -> World:
    return World(ranks, now=0.0, limits=LIMITS)


def sentence(world: World, now: float, *, all_ranks: bool = True) -> str | None:
    trouble = world.trouble(now=now, all_ranks=all_ranks)
    return None if trouble is None else trouble.sentence


def test_ranks_that_beat_and_get_on_are_not_missed() -> None:
    ranks = world(0, 1)
    for number, now in enumerate(range(0, 1000, 50)):
        ranks.hear(0, beat(number, pieces=number), now=now)
        ranks.hear(1, beat(number), now=now)
        assert sentence(ranks, now + 49) is None


def test_a_rank_whose_beat_does_not_change_is_missed_and_what_it_was_at_is_said() -> None:
    ranks = world(1, 2)
    ranks.hear(1, beat(0), now=1.0)
    ranks.hear(2, beat(0), now=1.0)
    ranks.hear(2, beat(1), now=50.0)
    ranks.hear(1, beat(0), now=50.0)  # the same again
    assert sentence(ranks, 61.0) is None
    trouble = ranks.trouble(now=62.0, all_ranks=True)
    assert trouble is not None and trouble.silent == (1,)
    assert trouble.sentence.startswith(
        "rank 1 has not been heard of for 61 s (update 3): its process is stopped or its"
    )


def test_a_rank_that_never_beat_is_missed() -> None:
    assert str(sentence(world(1), 61.0)).startswith("rank 1 has not been heard of for 61 s: its process")


def test_ranks_that_fall_silent_together_are_named_together() -> None:
    ranks = world(1, 2, 3)
    for rank, now in ((1, 100.0), (2, 40.0), (3, 44.0)):
        ranks.hear(rank, beat(1), now=now)
    trouble = ranks.trouble(now=101.0, all_ranks=True)
    assert trouble is not None and trouble.silent == (2, 3)
    assert trouble.sentence.startswith("ranks 2, 3 have not been heard of for 61 s (update 3): their processes are")


def test_a_standstill_is_that_of_all_ranks_beyond_the_limit_of_their_phase() -> None:
    ranks = world(0, 1)
    for now in range(0, 230, 10):
        ranks.hear(0, beat(now), now=now)
        ranks.hear(1, beat(now, pieces=min(now, 20)), now=now)  # the last to get something done, at 20 s
    assert sentence(ranks, 220.0) is None
    assert sentence(ranks, 221.0) == "no rank has got anything done for 201 s"


def test_the_most_patient_phase_that_a_rank_is_in_decides() -> None:
    ranks = world(0, 1)
    for now in range(0, 600, 10):
        ranks.hear(0, beat(now, "rollout 2", "rollout"), now=now)
        ranks.hear(1, beat(now), now=now)
        assert sentence(ranks, now) is None
    ranks.hear(0, beat(601, "rollout 2", "rollout"), now=601.0)
    assert sentence(ranks, 601.0) == "no rank has got anything done for 601 s"


def test_one_rank_alone_is_named_with_its_phase() -> None:
    ranks = world(0)
    ranks.hear(0, beat(0), now=0.0)
    ranks.hear(0, beat(1), now=201.0)
    assert sentence(ranks, 201.0) == "rank 0 has got nothing done for 201 s (update 3)"


@pytest.mark.parametrize("change", [{"phase": "update 4"}, {"pieces": 1}])
def test_a_piece_or_a_phase_further_is_something_done(change: dict[str, object]) -> None:
    ranks = world(0)
    ranks.hear(0, beat(0), now=100.0)
    ranks.hear(0, dataclasses.replace(beat(1), **change), now=199.0)  # type: ignore[arg-type]
    assert sentence(ranks, 201.0 + 50.0) is None


def test_who_does_not_listen_to_all_sees_silence_alone() -> None:
    ranks = world(0)
    for now in range(0, 2000, 10):
        ranks.hear(0, beat(now), now=now)
    assert sentence(ranks, 2000.0, all_ranks=False) is None
    assert "rank 0 has not been heard of" in str(sentence(ranks, 2060.0, all_ranks=False))


def test_a_collective_that_waits_too_long_is_a_hang_though_others_get_on() -> None:
    ranks = world(0, 1)
    ranks.hear(0, beat(1, pieces=1), now=1.0)
    ranks.hear(1, dataclasses.replace(beat(1), overdue_s=610.0), now=1.0)
    assert sentence(ranks, 1.0) == "a collective has waited for 610 s (--distributed-timeout-minutes)"
    ranks.hear(1, beat(2), now=2.0)  # it has ended after all
    assert sentence(ranks, 2.0) is None


def test_who_could_not_listen_itself_misses_nobody() -> None:
    ranks = world(0, 1)
    ranks.begin_again(now=5000.0)
    assert sentence(ranks, 5059.0) is None
    assert sentence(ranks, 5061.0) is not None


def test_a_beat_survives_the_store() -> None:
    said = beat(7, 'saving "hf-3"', "save", pieces=12)
    assert Beat.from_json(said.to_json().encode()) == said


@pytest.mark.parametrize("text", ["", "[]", "{}", "7", json.dumps({"number": "x"}), BAD_KIND])
def test_what_is_no_beat_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Beat.from_json(text)


def test_of_many_ranks_the_first_are_listed() -> None:
    assert numbers([1, 2, 5]) == "1, 2, 5"
    assert numbers(range(2, 512)) == "2, 3, 4, 5, 6, 7, 8, 9 and 502 more"
