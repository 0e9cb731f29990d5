"""Files appear whole or not at all, and grow by whole records."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

from tests.files.limits import files_of_at_most
from xrl.files.disk import NotWritten
from xrl.files.whole import WholeRecords, write_whole


def test_a_file_is_written_with_nothing_beside_it(tmp_path: Path) -> None:
    write_whole(tmp_path / "file", b"first")
    write_whole(tmp_path / "file", b"second", flush=False)
    assert (tmp_path / "file").read_bytes() == b"second"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_that_does_not_fit_leaves_the_old_one_and_says_what_it_needs(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")
    with files_of_at_most(1000), pytest.raises(NotWritten) as found:
        write_whole(path, b"x" * 1001)
    assert found.value.errno == errno.EFBIG
    assert str(found.value).startswith(f"{path} cannot be written: File too large: it needs 1,001 bytes, its disk has ")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_of_a_folder_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotWritten, match="gone/file cannot be written: No such file or directory"):
        write_whole(tmp_path / "gone" / "file", b"")


def test_a_record_that_does_not_fit_leaves_no_trace_and_comes_with_the_next(tmp_path: Path) -> None:
    records = WholeRecords(tmp_path / "log", head=b"head\n")
    records.append(b"one\n")
    with files_of_at_most(12):
        for record in (b"two\n", b"three\n"):
            with pytest.raises(NotWritten):
                records.append(record)
            assert records.path.read_bytes() == b"head\none\n"
    records.append(b"four\n")
    assert records.path.read_bytes() == b"head\none\ntwo\nthree\nfour\n"


def test_part_of_a_record_that_could_not_be_taken_back_is_taken_back_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> NoReturn:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    records = WholeRecords(tmp_path / "log")
    records.append(b"one\n")
    monkeypatch.setattr(os, "ftruncate", refuse)
    with files_of_at_most(6), pytest.raises(NotWritten, match="File too large"):
        records.append(b"two\n")
    assert records.path.read_bytes() == b"one\ntw"
    with pytest.raises(NotWritten, match="Input/output error"):
        records.append(b"three\n")
    monkeypatch.undo()
    records.append(b"four\n")
    assert records.path.read_bytes() == b"one\ntwo\nthree\nfour\n"


def test_what_others_appended_stays(tmp_path: Path) -> None:
    records = WholeRecords(tmp_path / "log")
    records.append(b"one\n")
    with records.path.open("ab") as file:
        file.write(b"theirs\n")
    with files_of_at_most(12), pytest.raises(NotWritten):
        records.append(b"two\n")
    records.append(b"three\n")
    assert records.path.read_bytes() == b"one\ntheirs\ntwo\nthree\n"


def test_a_file_that_was_removed_is_begun_again_and_its_folder_is_not(tmp_path: Path) -> None:
    records = WholeRecords(tmp_path / "run" / "inner" / "log", head=b"head\n", make_folder=True)
    with pytest.raises(NotWritten, match="No such file"):
        records.append(b"one\n")
    (tmp_path / "run").mkdir()
    records.append(b"two\n")
    records.path.unlink()
    records.append(b"three\n")
    assert records.path.read_bytes() == b"head\nthree\n"
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(NotWritten, match="No such file"):
        records.append(b"four\n")
    assert not (tmp_path / "run").exists()


def test_what_waits_is_bounded_and_what_is_lost_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("xrl"), "propagate", True)
    records = WholeRecords(tmp_path / "log")
    records.MAX_WAITING_BYTES = 10
    with files_of_at_most(0):
        for number in range(9):
            with pytest.raises(NotWritten):
                records.append(b"%d...\n" % number)
    records.flush()
    assert records.path.read_bytes() == b"7...\n8...\n"
    assert caplog.messages == [f"{records.path}: more waits to be written than is held; the oldest records are lost"]


def test_a_full_device_is_said_to_be_full(tmp_path: Path) -> None:
    (tmp_path / "log").symlink_to("/dev/full")
    with pytest.raises(NotWritten, match="log cannot be written: No space left on device: it needs 4 bytes"):
        WholeRecords(tmp_path / "log").append(b"one\n")
