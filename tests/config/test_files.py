"""Only regular files of a sensible size are read, and nothing waits for a pipe."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from xrl.config import SettingsError
from xrl.config.files import open_regular, read_whole


def refusal(file: Path, most_bytes: int = 10) -> str:
    with pytest.raises(SettingsError) as caught:
        read_whole(file, most_bytes=most_bytes)
    return str(caught.value)


def test_a_file_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    (tmp_path / "link").symlink_to("file")
    assert read_whole(tmp_path / "link", most_bytes=10) == b"0123456789"
    assert refusal(tmp_path / "file", 9) == f"{tmp_path}/file is larger than the 9 bytes that such a file may have"
    (tmp_path / "file").write_bytes(b"")
    assert read_whole(tmp_path / "file", most_bytes=10) == b""


def test_a_file_without_a_size_is_read_no_further_than_that() -> None:
    assert "larger than the 10 bytes" in refusal(Path("/proc/self/status"))


def test_a_file_with_nothing_in_it_may_be_as_large_as_it_likes(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.truncate(2**40)
    assert "larger than" in refusal(tmp_path / "file")


def test_other_things_than_files_are_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe") == f"{tmp_path}/pipe is a pipe: a file is needed"
    assert refusal(tmp_path) == f"{tmp_path} is a folder: a file is needed"
    assert refusal(Path("/dev/zero")) == "/dev/zero is a device: a file is needed"
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(tmp_path / "s"))
        assert "No such device" in refusal(tmp_path / "s")


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert "Too many levels of symbolic links" in refusal(tmp_path / "loop")
    assert "No such file" in refusal(tmp_path / "nothing")
    assert "File name too long" in refusal(tmp_path / ("x" * 300))
    for name in ("a\0b", "half \ud800"):
        assert "has characters that no file can have" in refusal(tmp_path / name)


def test_a_file_is_called_as_the_caller_likes(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="^--config x cannot be read: No such file"):
        open_regular(tmp_path / "nothing", what="--config x")
