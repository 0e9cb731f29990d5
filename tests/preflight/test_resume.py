"""A state that a run cannot go on from, and a folder that is not its own, are refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint.states import write
from tests.small_runs import Refusal, check, run_flags
from xrl.checkpoint.changes import identity
from xrl.config.parse import parse_settings
from xrl.models.shape import read_model_shape


@pytest.fixture
def run_dir(model: Path, data: Path, tmp_path: Path) -> Path:
    """Of a run that has saved two states."""
    folder = tmp_path / "run"
    settings = parse_settings(run_flags(model, data, tmp_path))
    said = identity(settings, read_model_shape(model))
    for step in (2, 4):
        write(folder / "state", step, identity=said)
    for name in ("config.yaml", "environment.json"):
        (folder / name).write_text("")
    return folder


def test_a_run_goes_on_where_nothing_stands_against_it(model: Path, data: Path, tmp_path: Path, run_dir: Path) -> None:
    check(model, data, tmp_path, "--run-dir", str(run_dir))
    check(model, data, tmp_path, "--resume", str(run_dir / "state" / "step-2"))
    check(model, data, tmp_path, "--run-dir", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_another_run_is_refused(refusal: Refusal, run_dir: Path) -> None:
    sentence = refusal("--run-dir", str(run_dir), "--seed", "7")
    assert "step-4 cannot be gone on from: it was saved with --seed 1234, now it is 7" in sentence


def test_the_state_before_a_damaged_one_will_do_and_a_named_one_must_be_whole(
    refusal: Refusal, model: Path, data: Path, tmp_path: Path, run_dir: Path
) -> None:
    (run_dir / "state" / "step-4" / "t0-p0-d0.safetensors").write_bytes(b"")
    check(model, data, tmp_path, "--run-dir", str(run_dir))
    assert "written by rank 0, has 0 bytes" in refusal("--resume", str(run_dir / "state" / "step-4"))
    assert "written by rank 0, has 0 bytes" in refusal("--resume", str(run_dir))


def test_two_runs_are_not_mixed_in_a_folder(refusal: Refusal, tmp_path: Path, run_dir: Path) -> None:
    other = tmp_path / "other"
    write(other / "state", 1)
    (other / "config.yaml").write_text("")
    (other / "environment.json").write_text("")
    sentence = refusal("--run-dir", str(other), "--resume", str(run_dir))
    assert "is of another run's folder" in sentence


def test_a_finished_model_is_not_written_over(refusal: Refusal, tmp_path: Path) -> None:
    (tmp_path / "run" / "hf-final").mkdir(parents=True)
    (tmp_path / "run" / ".xrl-runs-here").write_text("")
    sentence = refusal("--run-dir", str(tmp_path / "run"))
    assert "has a finished model (hf-final) and no saved state to go on from" in sentence


def test_a_run_that_was_killed_before_its_first_state_begins_again(model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "hf-5").mkdir(parents=True)
    (tmp_path / "run" / ".xrl-runs-here").write_text("")
    check(model, data, tmp_path, "--run-dir", str(tmp_path / "run"))


def test_a_folder_of_somebody_else_s_is_refused(refusal: Refusal, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("")
    assert "found thesis.tex in it" in refusal("--run-dir", str(tmp_path / "home"))
    assert "must be a folder, found a file" in refusal("--run-dir", str(tmp_path / "home" / "thesis.tex"))


def test_resume_of_a_path_that_is_nothing_is_refused(refusal: Refusal, tmp_path: Path) -> None:
    assert "found neither" in refusal("--resume", str(tmp_path / "nothing"))
