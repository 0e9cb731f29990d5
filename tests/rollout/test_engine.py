"""The table of engines, and what importing the contract costs."""

import subprocess
import sys
from pathlib import Path

import pytest

from xrl.config import SettingsError
from xrl.rollout import ENGINES, check_engine, create_engine


def test_unknown_engine_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="unknown: take one of embedded"):
        create_engine(
            "warp", model_dir=tmp_path, dtype="float32", device="cpu", max_batch_size=1, num_threads=1, max_model_len=8
        )


@pytest.mark.parametrize("name", ["no.such.package:make", "nosuchmodule:make", ":make", "json:"])
def test_engine_of_ones_own_must_be_importable(name: str) -> None:
    with pytest.raises(SettingsError, match=f"--engine '{name}'"):
        check_engine(name)


def test_engine_of_ones_own_is_taken() -> None:
    check_engine("tests.rollout.scripted_engine:make")


def test_the_table_lists_the_embedded_engine() -> None:
    assert "embedded" in ENGINES


def test_names_and_contract_are_importable_without_torch() -> None:
    code = "import sys, xrl.rollout, xrl.rollout.engine; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
