"""Folders appear whole or not at all, on file systems that lack one thing or another."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from pathlib import Path
from typing import Any, NoReturn

import pytest

from xrl.weights.atomic_folder import atomic_folder


def refuse(number: int) -> Any:
    """A system call of a file system that lacks it."""

    def call(*arguments: object) -> NoReturn:
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
