"""Names that the settings show are those of the tables; a misspelt one gets the nearest."""

from __future__ import annotations

import pytest

from xrl.algorithms import ALGORITHMS, check_algorithm
from xrl.config import AlgorithmConfig, SettingsError
from xrl.config.names import NAMES, known_name, nearest
from xrl.rewards import JUDGES, check_judge
from xrl.rollout import ENGINES, check_engine


def test_names_are_those_of_the_tables() -> None:
    assert set(NAMES["engine"].known) == set(ENGINES)
    assert set(NAMES["judge"].known) == set(JUDGES)
    assert set(NAMES["algorithm"].known) == set(ALGORITHMS)


def test_other_names_lead_to_known_ones() -> None:
    for names in NAMES.values():
        assert set(names.other.values()) <= set(names.known) and not set(names.other) & set(names.known)
    assert known_name("engine", "lmdeploy") == "turbomind"
    assert known_name("engine", "mine.engine:Engine") == "mine.engine:Engine"
    assert known_name("seed", "lmdeploy") == "lmdeploy"
    check_engine("lmdeploy")


def test_misspelt_names_get_the_nearest() -> None:
    with pytest.raises(SettingsError, match=r"--engine 'turbomin' is unknown \(the nearest is turbomind\)"):
        check_engine("turbomin")
    with pytest.raises(SettingsError, match=r"--engine 'LMDeploi' is unknown \(the nearest is lmdeploy\)"):
        check_engine("LMDeploi")
    with pytest.raises(SettingsError, match=r"--judge math_verify is unknown \(the nearest is math-verify\)"):
        check_judge("math_verify")
    with pytest.raises(SettingsError, match=r"--algorithm 'gpro' is unknown \(the nearest is grpo\)"):
        check_algorithm(AlgorithmConfig(algorithm="gpro"))


def test_a_name_like_no_other_gets_none() -> None:
    assert nearest("zzzz", ["train", "convert"]) is None
