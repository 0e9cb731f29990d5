"""Room on a disk is asked for before it is needed."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from xrl.config import SettingsError
from xrl.weights.disk import check_space, nearest_folder


def test_space_is_that_of_the_nearest_folder_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert nearest_folder(tmp_path / "a" / "b") == nearest_folder(tmp_path) == tmp_path
    monkeypatch.chdir(tmp_path)
    assert nearest_folder(Path("a/b")) == tmp_path


def test_more_than_is_free_is_refused_with_both_numbers(tmp_path: Path) -> None:
    target = tmp_path / "absent" / "target"
    check_space(target, 1, what="--to x")
    with pytest.raises(SettingsError, match=r"--to x needs 10,000,000,000,000,000 bytes, its disk has [\d,]+ free: y"):
        check_space(target, 10**16, what="--to x", instead=": y")
    assert not target.parent.exists()


def test_a_file_system_that_does_not_say_its_size_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=0, free=0))
    check_space(tmp_path, 10**16, what="--to x")

    def refuse(path: Path) -> None:
        raise OSError("Function not implemented")

    monkeypatch.setattr(shutil, "disk_usage", refuse)
    check_space(tmp_path, 10**16, what="--to x")
