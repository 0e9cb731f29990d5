"""The folder of a run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from xrl.config import SettingsError
from xrl.metrics.run_folder import RunFolder, check_writable


def test_folder_is_named_by_its_start_time(tmp_path):
    folder = RunFolder.create(tmp_path / "deep" / "work_dir")
    assert folder.path.is_dir()
    assert re.fullmatch(r"\d{14}", folder.path.name)
    assert folder.logs.is_dir()


def test_runs_that_start_in_the_same_second_get_folders_of_their_own(tmp_path):
    paths = [RunFolder.create(tmp_path).path for _ in range(20)]
    assert len(set(paths)) == 20
    assert sorted(tmp_path.iterdir()) == sorted(paths)  # and the trial of writing left nothing behind


def test_names_inside_are_those_of_the_manual(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.trajectory(3) == tmp_path / "rollout_idx_3_trajectory.jsonl"
    assert folder.checkpoint(40) == tmp_path / "hf-40"
    assert folder.final_checkpoint == tmp_path / "hf-final"
    assert folder.config == tmp_path / "config.yaml"


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_work_dir_that_is_a_file_is_refused_in_one_sentence(tmp_path, below):
    file = tmp_path / "taken"
    file.write_text("")
    with pytest.raises(SettingsError, match="--work-dir .*taken.* must be a folder that can be written to"):
        check_writable(file / below)


def test_a_work_dir_on_a_file_system_that_takes_no_files_is_refused():
    with pytest.raises(SettingsError, match="--work-dir /proc/xrl"):
        RunFolder.create(Path("/proc/xrl"))
