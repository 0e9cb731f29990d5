"""Temporary folders go with their process, however it ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from xrl.launch import temporary
from xrl.launch.temporary import LOCK_FILE, own_folder, remove_abandoned


@pytest.fixture(autouse=True)
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def age(folder: Path) -> None:
    hour_ago = time.time() - 3600
    os.utime(folder / LOCK_FILE, (hour_ago, hour_ago))


def test_a_folder_goes_with_its_block(parent: Path) -> None:
    with own_folder() as folder:
        assert folder.parent == parent and folder.name.startswith("xrl-")
        (folder / "file").touch()
    assert list(parent.iterdir()) == []


def test_what_a_killed_process_left_is_removed_by_the_next_one(parent: Path) -> None:
    program = "from xrl.launch.temporary import own_folder\nwith own_folder() as f: print(f, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(parent)},
    ) as other:
        assert other.stdout is not None
        folder = Path(other.stdout.readline().strip())
        age(folder)
        with own_folder():
            assert folder.is_dir(), "its process lives"
        os.kill(other.pid, signal.SIGKILL)
        other.wait(30)
        with own_folder() as own:
            assert list(parent.iterdir()) == [own]


def test_others_remove_a_folder_only_when_its_process_is_gone(parent: Path) -> None:
    with own_folder() as folder:
        remove_abandoned(folder)
        assert (folder / LOCK_FILE).is_file()
    folder.mkdir()
    (folder / LOCK_FILE).touch()
    (folder / "file").touch()
    remove_abandoned(folder)
    assert not folder.exists()
    remove_abandoned(folder)  # another process was first


def test_nothing_else_is_removed(parent: Path) -> None:
    others = [parent / name for name in ("xrl-notes", "xrl-young", "other-old")]
    for folder in others:
        folder.mkdir()
    (parent / "xrl-young" / LOCK_FILE).touch()
    (parent / "other-old" / LOCK_FILE).touch()
    age(parent / "other-old")
    (parent / "xrl-file").touch()
    with own_folder():
        assert {path.name for path in parent.iterdir()} >= {"xrl-notes", "xrl-young", "other-old", "xrl-file"}
    assert temporary.YOUNG_S > 0
