"""What the system says about a user's files becomes a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from xrl.config.errors import SettingsError, unreadable_files_refused


def test_a_file_that_cannot_be_looked_at_is_named(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "absent", "No such file"), (tmp_path / ("a" * 300), "File name too long")):
        with pytest.raises(SettingsError, match=f"{path} cannot be read: {reason}"), unreadable_files_refused():
            path.stat()


def test_an_error_of_no_file_stays_what_it_is() -> None:
    with pytest.raises(ConnectionResetError), unreadable_files_refused():
        raise ConnectionResetError("somebody went away")
