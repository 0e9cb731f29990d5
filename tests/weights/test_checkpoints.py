"""A checkpoint that cannot be written is written later, and what is written goes whole."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.files.limits import files_of_at_most
from xrl.config import RunConfig
from xrl.metrics.run_folder import RunFolder
from xrl.types import WeightBucket
from xrl.weights.checkpoints import Checkpoints, Clock

# Bytes of the one tensor that a checkpoint here has.
NUM_BYTES = 4096


class Time:
    """A clock that moves when somebody sleeps; a test says what happens at which second."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.events: dict[float, object] = {}

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds
        for moment in [moment for moment in self.events if moment <= self.seconds]:
            self.events.pop(moment)()  # type: ignore[operator]

    @property
    def clock(self) -> Clock:
        return Clock(now=lambda: self.seconds, sleep=self.sleep)


class Stream:
    """Buckets of one tensor, and whether they were gone through to the end."""

    def __init__(self, value: float = 1.0) -> None:
        self.value = value
        self.is_at_end = False

    def __iter__(self) -> Iterator[WeightBucket]:
        for layer in ("embeddings", "layers.0"):
            tensor = torch.full((NUM_BYTES // 8,), self.value)
            yield WeightBucket(version=0, part=layer, tensors={f"{layer}.weight": tensor})
        self.is_at_end = True


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """What of a model is copied."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text('{"of": "the model"}')
    return folder


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("xrl"), "propagate", True)
    return caplog


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "work")


def checkpoints(run: RunFolder, source: Path, time: Time, **settings: float) -> Checkpoints:
    config = RunConfig(**settings)  # type: ignore[arg-type]
    return Checkpoints(run, config, source=source, dtype=torch.float32, clock=time.clock)


def names(run: RunFolder) -> list[str]:
    return sorted(path.name for path in run.path.iterdir() if path.name != "logs")


def rename_files_only(source: Path, target: Path) -> None:
    if Path(source).is_dir():
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    os.replace(source, target)


def value_of(folder: Path) -> float:
    return float(load_file(folder / "model.safetensors")["embeddings.weight"][0])


def test_what_fails_during_training_is_due_again_a_minute_later_with_the_weights_of_then(
    run: RunFolder, source: Path, time: Time, said: pytest.LogCaptureFixture
) -> None:
    kept = checkpoints(run, source, time, save_interval=10)
    assert [index for index in range(1, 31) if kept.is_due(index)] == [10, 20, 30]
    stream = Stream(1.0)
    with files_of_at_most(1000):
        fault = kept.write("hf-10", stream)
    assert fault is not None and stream.is_at_end and names(run) == []
    kept.warn_once(fault)
    kept.warn_once(fault)
    (message,) = said.messages
    num_bytes = NUM_BYTES + sum(path.stat().st_size for path in source.iterdir())
    assert message.startswith(
        f"{run.checkpoint(10)} cannot be written: File too large: it needs {num_bytes:,} bytes, its disk has "
    )
    time.seconds = 59.0
    assert not kept.is_due(11) and kept.is_due(20)
    time.seconds = 60.0
    assert kept.is_due(12)
    assert kept.write("hf-12", Stream(2.0)) is None
    assert names(run) == ["hf-12"] and value_of(run.checkpoint(12)) == 2.0
    time.seconds = 1000.0
    assert not kept.is_due(13)


def test_without_an_interval_nothing_is_due(run: RunFolder, source: Path, time: Time) -> None:
    kept = checkpoints(run, source, time)
    assert not any(kept.is_due(index) for index in range(1, 100))


def test_the_end_of_a_run_waits_says_what_for_and_tries_again(
    run: RunFolder, source: Path, time: Time, said: pytest.LogCaptureFixture
) -> None:
    kept = checkpoints(run, source, time, save_retry_minutes=3.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    num_tries = 1
    with files_of_at_most(1000):
        time.events[100.0] = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        while (fault := kept.write("hf-final", Stream())) is not None:
            num_tries += 1
            assert kept.wait_for_room(fault)
    assert time.seconds == 100.0 and num_tries == 21
    assert names(run) == ["hf-final"]
    assert [message.partition("; ")[0].split(": ")[0] for message in said.messages] == [
        f"{run.final_checkpoint} cannot be written"
    ] * 2
    assert "for another 3 minutes" in said.messages[0] and "for another 2 minutes" in said.messages[1]


def test_the_end_of_a_run_gives_up_in_time(run: RunFolder, source: Path, time: Time) -> None:
    kept = checkpoints(run, source, time, save_retry_minutes=0.5)
    assert kept.write("hf-2", Stream()) is None
    with files_of_at_most(1000):
        while (fault := kept.write("hf-final", Stream())) is not None and kept.wait_for_room(fault):
            pass
    assert fault is not None and time.seconds == 30.0
    sentence = kept.words_about_loss(fault)
    assert str(run.final_checkpoint) in sentence and "File too large" in sentence
    assert sentence.endswith(
        f"tried again for 0.5 minutes (--save-retry-minutes); the newest checkpoint is {run.checkpoint(2)}"
    )
    assert names(run) == ["hf-2"]


def test_no_wait_is_one_try(run: RunFolder, source: Path, time: Time) -> None:
    kept = checkpoints(run, source, time, save_retry_minutes=0.0)
    with files_of_at_most(1000):
        fault = kept.write("hf-final", Stream())
    assert fault is not None and not kept.wait_for_room(fault) and time.seconds == 0.0
    assert kept.words_about_loss(fault).endswith("there is no checkpoint")


def test_a_disk_that_is_known_to_be_too_full_is_tried_once_a_minute_only(
    run: RunFolder, source: Path, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = checkpoints(run, source, time, save_retry_minutes=10.0)
    fault = kept.write("logs", Stream())  # in the way
    assert fault is not None
    room = False
    monkeypatch.setattr(type(fault), "lacks_room", property(lambda self: not room))
    assert kept.wait_for_room(fault) and time.seconds == 60.0
    assert kept.wait_for_room(fault) and time.seconds == 120.0
    room = True
    assert kept.wait_for_room(fault) and time.seconds == 125.0


def test_a_run_folder_that_is_gone_is_made_again(run: RunFolder, source: Path, time: Time) -> None:
    shutil.rmtree(run.path)
    assert checkpoints(run, source, time).write("hf-final", Stream()) is None
    assert names(run) == ["hf-final"]


def test_a_model_folder_that_is_gone_costs_no_weights(run: RunFolder, source: Path, time: Time) -> None:
    kept = checkpoints(run, source, time, save_retry_minutes=1.0)
    source.rename(source.with_name("elsewhere"))
    stream = Stream()
    fault = kept.write("hf-final", stream)
    assert fault is not None and stream.is_at_end
    assert str(fault).startswith(f"{run.final_checkpoint} cannot be written: No such file or directory ({source}")
    time.events[10.0] = lambda: source.with_name("elsewhere").rename(source)
    while fault is not None and kept.wait_for_room(fault):
        fault = kept.write("hf-final", Stream())
    assert fault is None and time.seconds == 10.0
    assert json.loads((run.final_checkpoint / "tokenizer.json").read_text()) == {"of": "the model"}


def test_a_folder_that_could_not_be_renamed_gets_its_name_later(
    run: RunFolder, source: Path, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = checkpoints(run, source, time)
    monkeypatch.setattr(os, "rename", rename_files_only)
    for value in (1.0, 2.0):
        fault = kept.write("hf-final", Stream(value))
        assert fault is not None and "is whole, but cannot be renamed" in str(fault)
    monkeypatch.undo()
    assert kept.write("hf-final", Stream(3.0)) is None
    assert names(run) == ["hf-final"] and value_of(run.final_checkpoint) == 1.0


def test_a_whole_folder_without_its_name_does_not_stay_beside_a_later_one(
    run: RunFolder, source: Path, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = checkpoints(run, source, time, save_interval=1)
    monkeypatch.setattr(os, "rename", rename_files_only)
    assert kept.write("hf-1", Stream(1.0)) is not None
    monkeypatch.undo()
    assert kept.write("hf-2", Stream(2.0)) is None
    assert names(run) == ["hf-2"]


def test_only_the_newest_of_this_run_are_kept(run: RunFolder, source: Path, time: Time) -> None:
    kept = checkpoints(run, source, time, save_interval=1, save_keep=2)
    theirs = ["hf-999", "hf-notes", "hf-\N{SUPERSCRIPT TWO}"]
    for name in theirs:
        (run.path / name).mkdir()
    (run.path / ".hf-0.deleted" / "inner").mkdir(parents=True)  # a killed one's
    for index in (1, 2, 9, 10):
        assert kept.write(f"hf-{index}", Stream()) is None
    assert kept.write("hf-final", Stream()) is None
    assert names(run) == sorted(["hf-10", "hf-9", "hf-final", *theirs])


def test_a_checkpoint_that_was_put_elsewhere_is_left_alone(
    run: RunFolder, source: Path, time: Time, tmp_path: Path
) -> None:
    kept = checkpoints(run, source, time, save_interval=1, save_keep=1)
    for index in (1, 2, 3):
        assert kept.write(f"hf-{index}", Stream()) is None
        if index == 1:
            run.checkpoint(1).rename(tmp_path / "elsewhere")
            run.checkpoint(1).symlink_to(tmp_path / "elsewhere")
        if index == 2:
            shutil.rmtree(run.checkpoint(2))
    assert names(run) == ["hf-1", "hf-3"] and (tmp_path / "elsewhere" / "model.safetensors").is_file()
