"""Variables of a launcher, forgotten where they are not meant for us."""

from __future__ import annotations

import pytest

from xrl.config import SettingsError
from xrl.launch.children import child_environment
from xrl.launch.variables import drop_rank_variables, rank_number

LEFT_OVER = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "ROLE_NAME": "default",
    "MASTER_ADDR": "10.255.255.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_ERROR_FILE": "/tmp/error.json",
    "PET_NNODES": "2",
}


def test_place_among_the_ranks_is_forgotten_and_all_else_stays() -> None:
    others = {"OMP_NUM_THREADS": "2", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5", "SLURM_JOB_ID": "7", "PATH": "/bin"}
    environment = LEFT_OVER | others
    drop_rank_variables(environment)
    assert environment == others


def test_a_child_of_a_rank_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (LEFT_OVER | {"OMP_NUM_THREADS": "2"}).items():
        monkeypatch.setenv(name, value)
    environment = child_environment()
    assert not environment.keys() & LEFT_OVER.keys()
    assert environment["OMP_NUM_THREADS"] == "2"


def test_numbers_of_a_launcher_are_read() -> None:
    assert rank_number({"RANK": "3"}, "RANK", 0) == 3
    assert rank_number({}, "WORLD_SIZE", 1) == 1


@pytest.mark.parametrize("text", ["", "x", "²", "٣", " 1", "+1", "-1", "1_0", "9" * 5000])
def test_other_words_of_a_launcher_are_one_sentence(text: str) -> None:
    with pytest.raises(SettingsError, match="the variable RANK must be a whole number >= 0, found "):
        rank_number({"RANK": text}, "RANK", 0)
