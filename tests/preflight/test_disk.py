"""A disk too small for the checkpoints of a run is refused before anything starts."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.files.limits import files_of_at_most
from tests.small_runs import Refusal, check
from xrl.config import SettingsError
from xrl.files import disk
from xrl.preflight.disk import RECORD_BYTES, RECORD_FILES
from xrl.preflight.model import check_model


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A disk whose free bytes a test sets."""
    usage = SimpleNamespace(total=10**12, free=10**12)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage)
    return usage


def needed(sentence: str) -> int:
    match = re.search(r"needs ([\d,]+) bytes", sentence)
    assert match is not None, sentence
    return int(match[1].replace(",", ""))


def test_a_disk_too_small_for_the_final_checkpoint_is_refused(
    refusal: Refusal, free: SimpleNamespace, model: Path, data: Path, tmp_path: Path
) -> None:
    free.free = 1000
    sentence = refusal("--no-bf16")
    assert f"--work-dir {tmp_path / 'work'} (for 1 Hugging Face checkpoint) needs" in sentence
    assert "its disk has 1,000 free" in sentence and "--save-keep" not in sentence
    num_bytes = needed(sentence)
    checkpoint = num_bytes - RECORD_BYTES
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert check_model(model).num_layers == 4
    assert 0.9 * weights < checkpoint < 1.2 * weights
    # In bf16 the weights are half as large.
    assert weights / 2 < num_bytes - needed(refusal("--bf16")) + 20_000 < weights / 2 + 40_000
    free.free = num_bytes
    check(model, data, tmp_path, "--no-bf16")
    free.free = num_bytes - 1
    with pytest.raises(Exception, match="needs"):
        check(model, data, tmp_path, "--no-bf16")


def test_a_disk_that_takes_no_writes_is_not_said_to_be_full(
    refusal: Refusal, free: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free.free = 0
    statvfs = os.statvfs
    changed = {"f_flag": os.ST_RDONLY}
    monkeypatch.setattr(disk.os, "statvfs", lambda path: SimpleNamespace(f_files=statvfs(path).f_files, **changed))
    sentence = refusal("--no-bf16")
    assert sentence.endswith(
        f"--work-dir {tmp_path / 'work'} must be a folder that can be written to: Read-only file system"
    )
    assert not (tmp_path / "work").exists()


def test_every_checkpoint_that_will_lie_there_is_counted(refusal: Refusal, free: SimpleNamespace) -> None:
    free.free = 0
    one = needed(refusal("--no-bf16")) - RECORD_BYTES
    for flags, count in (
        (("--num-rollouts", "10"), 1),
        (("--num-rollouts", "10", "--save-interval", "3"), 4),
        (("--num-rollouts", "9", "--save-interval", "3"), 3),  # the last rollout's is hf-final
        (("--num-rollouts", "10", "--save-interval", "1", "--save-keep", "2"), 3),
        (("--num-rollouts", "2", "--save-interval", "1", "--save-keep", "9"), 2),
        (("--num-epochs", "6", "--save-interval", "2"), 6),  # 8 prompts by 4: 12 rollouts
    ):
        sentence = refusal("--no-bf16", *flags)
        assert needed(sentence) == count * one + RECORD_BYTES
        assert ("--save-keep" in sentence) == (count > 2)


def test_files_are_counted_as_well_as_bytes(
    refusal: Refusal, free: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    inodes = SimpleNamespace(f_files=10**6, f_favail=0, f_flag=0)
    monkeypatch.setattr(disk.os, "statvfs", lambda path: inodes)

    def needed_files(*flags: str) -> int:
        match = re.search(r"needs ([\d,]+) files, its disk has room for 0", refusal(*flags))
        assert match is not None
        return int(match[1])

    one, three = needed_files(), needed_files("--num-rollouts", "10", "--save-interval", "4")
    assert three - RECORD_FILES == 3 * (one - RECORD_FILES) > 0


def test_a_limit_on_the_size_of_files_is_noticed(refusal: Refusal) -> None:
    with files_of_at_most(1000):
        sentence = refusal("--no-bf16")
    assert "needs a file of " in sentence and "may have 1,000: raise `ulimit -f`" in sentence


def test_what_a_killed_run_left_makes_room_first(model: Path, data: Path, tmp_path: Path) -> None:
    run = tmp_path / "work" / "20260101000000"
    left = run / ".hf-3.deleted"
    left.mkdir(parents=True)
    (run / "config.yaml").touch()
    with pytest.raises(SettingsError):
        check(model, data, tmp_path, "--max-prompt-length", "100000")
    assert left.is_dir()  # bad settings touch nothing
    check(model, data, tmp_path)
    assert list(run.iterdir()) == [run / "config.yaml"]
