"""Room on a disk is asked for before it is needed."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.files.limits import files_of_at_most
from xrl.config import SettingsError
from xrl.files.disk import NotWritten, check_file_size, check_space, nearest_folder


def test_space_is_that_of_the_nearest_folder_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert nearest_folder(tmp_path / "a" / "b") == nearest_folder(tmp_path) == tmp_path
    monkeypatch.chdir(tmp_path)
    assert nearest_folder(Path("a/b")) == tmp_path


def test_more_than_is_free_is_refused_with_both_numbers(tmp_path: Path) -> None:
    target = tmp_path / "absent" / "target"
    check_space(target, 1, what="--to x")
    with pytest.raises(
        SettingsError, match=r"--to x needs 10,000,000,000,000,000 bytes, its disk has [\d,]+ free, so .* full: y"
    ):
        check_space(target, 10**16, what="--to x", instead=": y")
    assert not target.parent.exists()


def test_a_file_system_that_does_not_say_its_size_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=0, free=0))
    check_space(tmp_path, 10**16, what="--to x")

    def refuse(path: Path) -> None:
        raise OSError("Function not implemented")

    monkeypatch.setattr(shutil, "disk_usage", refuse)
    check_space(tmp_path, 10**16, what="--to x")


def test_too_many_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = SimpleNamespace(f_files=1000, f_favail=3)
    monkeypatch.setattr(os, "statvfs", lambda path: counted)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10, free=10))
    check_space(tmp_path, 1, what="--to x", num_files=3)
    with pytest.raises(
        SettingsError, match=r"--to x needs 4 files, its disk has room for 3 \(inodes\), .* too full: y"
    ):
        check_space(tmp_path, 1, what="--to x", num_files=4, instead=": y")
    counted.f_files = 0  # btrfs, say, does not count them
    check_space(tmp_path, 1, what="--to x", num_files=4)
    counted.f_files, counted.f_favail = 1000, 0
    fault = NotWritten(tmp_path / "x", OSError(errno.ENOSPC, "No space left on device"), num_bytes=7)
    assert str(fault).endswith("it needs 7 bytes, its disk has no room for another file (inodes)")


def test_a_file_larger_than_the_shell_allows_is_refused() -> None:
    check_file_size(10**15, what="--to x")
    with files_of_at_most(10**6):
        check_file_size(10**6, what="--to x")
        with pytest.raises(SettingsError, match=r"--to x needs a file of 1,000,001 bytes, .* have 1,000,000: .*ulimit"):
            check_file_size(10**6 + 1, what="--to x")


@pytest.mark.parametrize(
    ("why", "number", "words"),
    [
        (OSError(errno.EROFS, "Read-only file system"), errno.EROFS, "Read-only file system"),
        (OSError("it is in the way"), None, "it is in the way"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), errno.ENOSPC, "No space left on device"),
        (RuntimeError("IoError(Os { code: 122, kind: Other })"), errno.EDQUOT, "Disk quota exceeded"),
        (RuntimeError(), None, "RuntimeError"),
    ],
)
def test_whoever_noticed_that_something_was_not_written_it_is_one_sentence(
    why: Exception, number: int | None, words: str, tmp_path: Path
) -> None:
    fault = NotWritten(tmp_path / "x" / "y", why, num_bytes=1000)
    assert fault.errno == number
    assert str(fault).startswith(f"{tmp_path / 'x' / 'y'} cannot be written: {words}: it needs 1,000 bytes, its disk ")


def test_a_file_elsewhere_that_is_to_blame_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "model" / "tokenizer.json"
    why = OSError(errno.ENOENT, "No such file or directory", str(missing))
    assert f"No such file or directory ({missing})" in str(NotWritten(tmp_path / "run" / "hf-1", why, num_bytes=0))
    why.filename = str(tmp_path / "run" / ".hf-1.partial" / "config.json")
    assert ".partial" not in str(NotWritten(tmp_path / "run" / "hf-1", why, num_bytes=0))


def test_room_is_asked_for_again_only_where_it_was_room_that_lacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(total=100, free=9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    full = NotWritten(tmp_path, OSError(errno.ENOSPC, "No space left on device"), num_bytes=10)
    assert full.lacks_room
    assert not NotWritten(tmp_path, OSError(errno.EDQUOT, "Disk quota exceeded"), num_bytes=10).lacks_room
    usage.free = 10
    assert not full.lacks_room
