"""The folder of a run."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from pathlib import Path

import pytest

from xrl.config import SettingsError
from xrl.metrics.run_folder import RunFolder, check_writable, remove_leftovers_of_runs


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


def test_a_disk_without_room_for_a_folder_is_refused_in_one_sentence(tmp_path, monkeypatch):
    make = os.mkdir

    def refuse_logs(path, *arguments):
        if Path(path).name == "logs":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        make(path, *arguments)

    monkeypatch.setattr(os, "mkdir", refuse_logs)
    with pytest.raises(SettingsError, match=rf"{tmp_path}/\d+ cannot be written: No space left on device"):
        RunFolder.create(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_newest_checkpoint_is_a_folder_of_a_name_that_a_run_gives(tmp_path):
    run = RunFolder(tmp_path)
    assert run.newest_checkpoint is None
    for name in ("hf-2", "hf-10", ".hf-12.partial", "hf-notes", "hf-\N{ARABIC-INDIC DIGIT NINE}9"):
        (tmp_path / name).mkdir()
    (tmp_path / "hf-11").write_text("a file")
    assert run.newest_checkpoint == run.checkpoint(10)
    (tmp_path / "hf-final").mkdir()
    assert run.newest_checkpoint == run.final_checkpoint


def test_what_killed_runs_left_goes_at_the_next_start_and_nothing_else_does(tmp_path):
    runs = RunFolder.create(tmp_path), RunFolder.create(tmp_path)
    theirs = RunFolder(tmp_path / "mine")
    without_config = RunFolder(tmp_path / "20200101000000")
    for run in (*runs, theirs, without_config):
        (run.path / ".hf-3.deleted").mkdir(parents=True)
        (run.path / ".hf-3.deleted" / "file").touch()
        (run.path / "hf-4").mkdir()
    for run in (*runs, theirs):
        run.config.touch()
    (tmp_path / "20200101000001").write_text("a file")
    remove_leftovers_of_runs(tmp_path)
    for run in runs:
        assert sorted(path.name for path in run.path.iterdir()) == ["config.yaml", "hf-4", "logs"]
    for run in (theirs, without_config):
        assert (run.path / ".hf-3.deleted" / "file").is_file()
    remove_leftovers_of_runs(tmp_path / "absent")


def test_attempts_at_a_run_share_its_folder_and_only_one_of_them_is_live(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "first"
    with contextlib.ExitStack() as live:
        folder = RunFolder.open(path, live)
        assert folder.path == path and folder.logs.is_dir()
        with contextlib.ExitStack() as second, pytest.raises(SettingsError, match="another run is live in it"):
            RunFolder.open(path, second)
    with contextlib.ExitStack() as later:
        assert RunFolder.open(path, later) == folder


def test_a_folder_with_something_else_in_it_is_no_run_s(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with contextlib.ExitStack() as stack, pytest.raises(SettingsError, match=r"found thesis.tex in it"):
        RunFolder.open(tmp_path, stack)
    assert [each.name for each in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_a_run_leaves_that_is_killed_at_once_is_known_as_a_run_s(tmp_path: Path) -> None:
    (tmp_path / ".xrl-runs-here").write_text("")
    with contextlib.ExitStack() as stack:
        RunFolder.open(tmp_path, stack)
