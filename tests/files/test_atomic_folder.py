"""Folders appear whole or not at all, on file systems that lack one thing or another."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest

from xrl.files.atomic_folder import atomic_folder, remove_folder, remove_leftovers


def refuse(number: int) -> Any:
    """A system call of a file system that lacks it."""

    def call(*arguments: object, **options: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return call


def write(target: Path) -> None:
    with atomic_folder(target) as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "file").write_text("whole")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.EPERM, errno.EIO])
def test_a_file_system_without_locks_is_written_all_the_same(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fcntl, "flock", refuse(number))
    with caplog.at_level(logging.WARNING, logger="xrl"):
        write(tmp_path / "target")
    assert (tmp_path / "target" / "inner" / "file").read_text() == "whole"
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["inner"]
    (record,) = caplog.records
    assert "without a lock" in record.getMessage() and os.strerror(number) in record.getMessage()


def test_another_process_keeps_its_lock(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "target"):
        with pytest.raises(FileExistsError, match="another process writes"), atomic_folder(tmp_path / "target"):
            pass
        assert (tmp_path / ".target.partial").is_dir()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF])
def test_what_cannot_be_flushed_is_written_all_the_same(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", refuse(number))
    write(tmp_path / "target")
    assert (tmp_path / "target" / "inner" / "file").read_text() == "whole"


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fails_leaves_nothing(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", refuse(number))
    with pytest.raises(OSError, match=os.strerror(number)):
        write(tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_renamed_is_kept_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "rename", refuse(errno.EXDEV))
    with pytest.raises(OSError, match=r"\.target\.partial is whole, but cannot be renamed to target: Invalid cross"):
        write(tmp_path / "target")
    assert (tmp_path / ".target.partial" / "inner" / "file").read_text() == "whole"
    monkeypatch.undo()
    with pytest.raises(FileExistsError, match="in the way, and not ours to remove"):
        write(tmp_path / "target")
    assert (tmp_path / ".target.partial" / "inner" / "file").read_text() == "whole"


@pytest.mark.parametrize("does_rename", [False, True])
def test_whoever_is_killed_at_the_last_step_leaves_nothing_that_is_in_the_way(
    does_rename: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename

    def killed(source: Path, target: Path) -> NoReturn:
        if does_rename:
            rename(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "hf-1")
    monkeypatch.undo()
    remove_leftovers(tmp_path, NAME)
    if does_rename:
        remove_folder(tmp_path / "hf-1")
    write(tmp_path / "hf-1")
    assert [path.name for path in tmp_path.iterdir()] == ["hf-1"]
    assert [path.name for path in (tmp_path / "hf-1").iterdir()] == ["inner"]


NAME = re.compile(r"hf-[0-9]+")


def test_a_folder_that_goes_loses_its_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "hf-1")
    monkeypatch.setattr(shutil, "rmtree", refuse(errno.EIO))  # as if the process were killed then
    with pytest.raises(OSError, match="Input/output error"):
        remove_folder(tmp_path / "hf-1")
    monkeypatch.undo()
    (left,) = tmp_path.iterdir()
    assert left.name == ".hf-1.deleted"
    write(tmp_path / "hf-1")
    remove_folder(tmp_path / "hf-1")  # nor is it hindered by what is left
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_the_killed_go_and_nothing_else_does(tmp_path: Path) -> None:
    ours = tmp_path / ".hf-1.partial", tmp_path / ".hf-2.deleted"
    theirs = [
        tmp_path / name for name in (".hf-1.kept", ".notes.deleted", "hf-3.deleted", ".hf-x.partial", ".hf-4.partial")
    ]
    for folder in (*ours, *theirs):
        folder.mkdir()
        (folder / "file").write_text("content")
    (ours[0] / "xrl-writes-here").touch()
    (tmp_path / ".hf-5.deleted").write_text("a file of somebody's")
    (tmp_path / ".hf-6.deleted").symlink_to(theirs[0], target_is_directory=True)
    with atomic_folder(tmp_path / "hf-7") as written_now:
        remove_leftovers(tmp_path, NAME)
        assert written_now.is_dir()
    assert not any(folder.exists() for folder in ours)
    assert all((folder / "file").is_file() for folder in theirs)
    assert (tmp_path / ".hf-5.deleted").is_file() and (tmp_path / ".hf-6.deleted").is_symlink()
    assert (tmp_path / "hf-7").is_dir()
    remove_leftovers(tmp_path / "absent", NAME)


def test_what_interrupts_the_writing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(SystemExit), atomic_folder(tmp_path / "target") as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "file").write_text("half")
        raise SystemExit(143)
    assert list(tmp_path.iterdir()) == []
