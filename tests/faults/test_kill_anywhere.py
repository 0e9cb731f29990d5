"""Runs that are killed anywhere go on, and end as if they had not been."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults.kill_anywhere import kinds_of, next_kind, run


@pytest.mark.slow
def test_a_run_that_is_killed_in_a_save_a_resume_and_elsewhere_ends_the_same(tmp_path: Path) -> None:
    tally = run(1, 3, [], tmp_path)
    assert not tally.faults
    assert tally.kills == 3
    assert tally.in_a_save >= 1


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize(
    ("seed", "num_kills", "flags"),
    [
        (2, 12, []),
        (3, 8, ["--nproc-per-node", "2", "--pipeline-model-parallel-size", "2"]),
    ],
    ids=["1 rank", "2 ranks"],
)
def test_twenty_kills(seed: int, num_kills: int, flags: list[str], tmp_path: Path) -> None:
    tally = run(seed, num_kills, flags, tmp_path)
    assert not tally.faults
    assert tally.kills == num_kills


def test_saves_and_resumes_are_among_the_moments() -> None:
    for seed in range(20):
        kinds = kinds_of(20, random.Random(seed))
        assert (len(kinds), kinds.count("save"), kinds.count("resume")) == (20, 5, 3)


def test_a_kill_inside_a_resume_waits_until_there_is_something_to_resume() -> None:
    kinds = ["resume", "resume", "any", "save"]
    assert next_kind(kinds, 0, can_resume=False) == "any"
    assert next_kind(kinds, 1, can_resume=True) == "resume"
    assert next_kind(kinds, 2, can_resume=False) == "save"
    assert next_kind(kinds, 3, can_resume=False) == "save", "where nothing else is left"
