"""Which state a run goes on from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoint.states import write
from xrl.checkpoint.choose import put_aside, state_to_resume
from xrl.checkpoint.manifest import Unusable
from xrl.config import RunConfig, SettingsError


def test_a_run_without_a_folder_of_its_own_or_without_states_begins_at_the_beginning(tmp_path: Path) -> None:
    assert state_to_resume(RunConfig()).state is None
    assert state_to_resume(RunConfig(run_dir=tmp_path)).state is None
    assert state_to_resume(RunConfig(run_dir=tmp_path / "not there yet", resume="never")).state is None


def test_the_newest_whole_state_is_taken_and_damaged_ones_are_told(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        write(tmp_path / "state", step)
    (tmp_path / "state" / "step-10" / "t0-p0-d0.safetensors").write_bytes(b"")
    choice = state_to_resume(RunConfig(run_dir=tmp_path))
    assert choice.state is not None
    assert choice.state.manifest.step == 9
    ((folder, why),) = choice.damaged
    assert folder.name == "step-10"
    assert "has 0 bytes" in why
    without = state_to_resume(RunConfig(run_dir=tmp_path), without={tmp_path / "state" / "step-9": "why"}).state
    assert without is not None
    assert without.manifest.step == 2


def test_states_of_which_none_is_whole_are_not_written_over(tmp_path: Path) -> None:
    folder = write(tmp_path / "state", 2)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(Unusable, match="is no JSON.*has no other whole state"):
        state_to_resume(RunConfig(run_dir=tmp_path))
    with pytest.raises(Unusable, match="a flipped bit, and .* has no other whole state"):
        state_to_resume(RunConfig(run_dir=tmp_path), without={folder: "a flipped bit"})


def test_never_means_that_there_is_none(tmp_path: Path) -> None:
    write(tmp_path / "state", 2)
    with pytest.raises(SettingsError, match=r"--resume never, but --run-dir .* has a saved state \(step-2\)"):
        state_to_resume(RunConfig(run_dir=tmp_path, resume="never"))


def test_a_named_state_is_that_one_and_no_other(tmp_path: Path) -> None:
    old, new = write(tmp_path / "state", 2), write(tmp_path / "state", 3)
    for named, step in ((old, 2), (new, 3), (tmp_path, 3)):
        state = state_to_resume(RunConfig(resume=str(named))).state
        assert state is not None
        assert state.manifest.step == step
    (new / "t0-p0-d0.safetensors").unlink()
    for named in (new, tmp_path):
        with pytest.raises(Unusable, match="is missing"):
            state_to_resume(RunConfig(resume=str(named)))
    with pytest.raises(SettingsError, match=r"--resume .* needs a saved state .* found neither"):
        state_to_resume(RunConfig(resume=str(tmp_path / "elsewhere")))


def test_what_is_put_aside_keeps_what_it_has(tmp_path: Path) -> None:
    names = [put_aside(write(tmp_path, 2), "damaged").name for _ in range(3)]
    assert names == ["step-2.damaged", "step-2.damaged-2", "step-2.damaged-3"]
    assert all((tmp_path / name / "manifest.json").is_file() for name in names)
