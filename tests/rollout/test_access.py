"""Keys: where they come from, and what is none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from xrl.config import SettingsError
from xrl.rollout.access import (
    KEY_VARIABLE,
    Access,
    default_key_file,
    is_run_id,
    new_key,
    new_run_id,
    shared_key,
    take_key_from,
)

KEY = "k" * 40


def write(file: Path, text: str, mode: int = 0o600) -> Path:
    file.write_text(text)
    file.chmod(mode)
    return file


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path


def test_key_of_a_user_is_made_once_and_for_them_alone(home: Path) -> None:
    key = shared_key(None, flag="--key-file")
    assert len(bytes.fromhex(key)) == 32
    assert shared_key(None, flag="--rollout-worker-key-file") == key
    file = home / "xrl" / "worker.key"
    assert file == default_key_file("--key-file") and file.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in file.parent.iterdir()] == ["worker.key"]  # no draft is left


def test_key_file_that_the_other_side_makes_meanwhile_is_the_one_taken(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def link_after_the_other(source: Path, target: Path) -> None:
        write(target, KEY)
        link(source, target)

    monkeypatch.setattr(os, "link", link_after_the_other)
    assert shared_key(None, flag="--key-file") == KEY


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660])
def test_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    file = write(tmp_path / "key", KEY, mode)
    with pytest.raises(SettingsError, match=rf"--key-file .*key has mode {mode:04o}.*chmod 600"):
        shared_key(file, flag="--key-file")


@pytest.mark.parametrize(
    "text", ["", "\n", "short", "k" * 31, "k" * 513, "k" * 40 + "\n" + "k" * 40, "ä" * 40, "k k" * 20]
)
def test_file_without_a_key_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(SettingsError, match="must hold one key of 32 to 512 letters"):
        shared_key(write(tmp_path / "key", text), flag="--key-file")


def test_file_that_is_not_there_is_named_with_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"--key-file .*none does not exist: `\(umask 077; openssl"):
        shared_key(tmp_path / "none", flag="--key-file")


def test_pipe_and_folder_are_no_keys_and_nobody_waits_for_them(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for file in (tmp_path / "pipe", tmp_path):
        with pytest.raises(SettingsError, match="must be a file with a key|cannot be read"):
            shared_key(file, flag="--key-file")


def test_home_that_cannot_be_written_to_is_a_sentence(home: Path) -> None:
    (home / "xrl").write_text("a file where the folder should be")
    with pytest.raises(SettingsError, match="cannot be written to .*: give --key-file FILE"):
        shared_key(None, flag="--key-file")


def test_key_of_the_environment_is_taken_out_of_it() -> None:
    environment = {KEY_VARIABLE: KEY, "OTHER": "1"}
    assert take_key_from(environment) == KEY
    assert environment == {"OTHER": "1"}
    assert take_key_from(environment) is None
    with pytest.raises(SettingsError, match=KEY_VARIABLE):
        take_key_from({KEY_VARIABLE: "short"})


def test_key_is_not_shown_where_its_holder_is_printed() -> None:
    access = Access(key=new_key(), run_id="r")
    assert access.key not in repr(access)
    assert access.headers["Authorization"] == f"Bearer {access.key}"


def test_runs_have_names_of_their_own() -> None:
    assert len({new_run_id("20261128") for _ in range(100)}) == 100
    assert new_run_id("20261128").startswith("20261128-")
    for name in ("", "a b", "ä", "x" * 65, "a/b\n"):
        assert is_run_id(new_run_id(name)) and not new_run_id(name).startswith("x")
