"""An algorithm of the user's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.samples import group, sample
from xrl.algorithms import check_algorithm, create_algorithm
from xrl.config import AlgorithmConfig, SettingsError
from xrl.data.packing import size_of

LONGEST = """
from xrl.algorithms.grpo import GRPO


class Mine(GRPO):
    def keep(self, group):
        return len(group.episodes) == 3

    def token_shares(self, sizes):
        return [1.0 / max(size.num_trained for size in sizes) for size in sizes]

    def loss(self, inputs):
        return super().loss(inputs)


class Few:
    fused_loss = None

    def __init__(self, config):
        self.settings = object()

    def score(self, groups): ...
    def loss(self, inputs): ...


class Broken:
    def __init__(self, config):
        raise KeyError("nothing")


function = len
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(LONGEST)
    return path


def test_a_class_in_a_file_is_built_from_the_settings(file: Path) -> None:
    config = AlgorithmConfig(algorithm=f"{file}:Mine", updates_per_rollout=2)
    check_algorithm(config)
    mine = create_algorithm(config)
    assert mine.settings is config and mine.fused_loss is None
    assert mine.token_shares([size_of(sample([1], [2, 3])), size_of(sample([1], [2]))]) == [0.5, 0.5]
    assert {each.group_id for each in mine.score([group(1.0, 0.0), group(1.0, 0.0, 0.0)]).samples} == {1}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Few", r"Few lacks keep\(\), token_shares\(\), settings.updates_per_rollout, .*settings.entropy_coef: derive"),
        (
            "Broken",
            r"Broken cannot be built from the settings: KeyError: 'nothing' \(.*mine.py, line 28, in __init__\)",
        ),
        ("function", "function in .* is a builtin_function_or_method, not a class"),
        ("Absent", "has no Class 'Absent'"),
    ],
)
def test_what_a_run_could_not_use_is_refused(file: Path, name: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        create_algorithm(AlgorithmConfig(algorithm=f"{file}:{name}"))


def test_a_file_that_is_not_there_or_fails_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--algorithm: no file"):
        check_algorithm(AlgorithmConfig(algorithm=f"{tmp_path}/absent.py:Mine"))
    (tmp_path / "wrong.py").write_text("1 / 0")
    wrong = AlgorithmConfig(algorithm=f"{tmp_path}/wrong.py:Mine")
    check_algorithm(wrong)  # it is there, and is not run yet
    with pytest.raises(SettingsError, match="cannot import .*wrong.py: ZeroDivisionError"):
        create_algorithm(wrong)
