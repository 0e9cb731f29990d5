"""The log of a judge's output."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from xrl.rewards.output import CappedOutput


def written(log: Path, *texts: bytes, max_bytes: int) -> None:
    read_end, write_end = os.pipe()
    os.set_blocking(read_end, False)
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    output = CappedOutput(file, max_bytes)
    for text in texts:
        os.write(write_end, text)
        assert output.take_from(read_end)
    os.close(write_end)
    assert not output.take_from(read_end)
    output.end()
    os.close(read_end)
    os.close(file)


def test_what_fits_is_kept_as_it_is(tmp_path: Path) -> None:
    written(tmp_path / "log", b"one\n", b"\x1b[2J\n", max_bytes=9)
    assert (tmp_path / "log").read_bytes() == b"one\n\x1b[2J\n"


def test_what_is_beyond_is_counted_in_one_line(tmp_path: Path) -> None:
    written(tmp_path / "log", b"x" * 8, b"y" * 3000, b"z", max_bytes=10)
    assert (tmp_path / "log").read_text() == "x" * 8 + "yy\n[the log is full: 2,999 bytes more were dropped]\n"


def test_next_process_of_a_worker_goes_on_where_the_last_one_ended(tmp_path: Path) -> None:
    written(tmp_path / "log", b"x" * 8, max_bytes=10)
    written(tmp_path / "log", b"y" * 8, max_bytes=10)
    written(tmp_path / "log", b"z", max_bytes=10)
    assert (tmp_path / "log").read_text().splitlines() == [
        "x" * 8 + "yy",
        "[the log is full: 6 bytes more were dropped]",
        "",
        "[the log is full: 1 bytes more were dropped]",
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_full_disk_is_no_reason_to_stop_reading() -> None:
    written(Path("/dev/full"), b"x" * 1000, max_bytes=10_000)
