"""Notes in a folder, written and read as a store's values."""

from __future__ import annotations

from pathlib import Path

import pytest

from xrl.files.notes import MOST_BYTES, Notes


def test_a_note_is_read_by_another_with_the_same_folder(tmp_path: Path) -> None:
    Notes(tmp_path / "notes").set("xrl/report/1/0", "here")
    reader = Notes(tmp_path / "notes")
    assert reader.get("xrl/report/1/0") == b"here"
    assert reader.check(["xrl/report/1/0"])
    assert not reader.check(["xrl/report/1/0", "xrl/report/1/1"])


def test_numbers_are_added_up_from_0(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "notes")
    assert [notes.add("asked", 1), notes.add("asked", 2)] == [1, 3]
    assert notes.get("asked") == b"3"


def test_the_folder_is_made_by_the_first_note_alone(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "notes")
    assert not notes.check(["asked"]) and not (tmp_path / "notes").exists()
    with pytest.raises(OSError):
        notes.get("asked")


def test_a_note_that_cannot_be_written_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        Notes(tmp_path / "gone" / "notes").set("asked", "1")


def test_of_a_huge_note_the_beginning_is_read(tmp_path: Path) -> None:
    notes = Notes(tmp_path)
    (tmp_path / "asked").write_bytes(b"1" * (MOST_BYTES + 1))
    assert len(notes.get("asked")) == MOST_BYTES
