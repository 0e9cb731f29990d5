"""Whole runs whose disk is full for a while: the logs have a gap at most, and the model is the same to the bit."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.launch.processes import Run, started
from tests.small_runs import run_flags, write_rows
from tests.tiny_models import make_checkpoint

NUM_ROLLOUTS = 4
TWO_RANKS = ("--nproc-per-node", "2", "--tensor-model-parallel-size", "2")
# Set where namespaces can be made: then a test that cannot make one fails.
NEED_NAMESPACES = "XRL_TESTS_NEED_NAMESPACES"

pytestmark = [pytest.mark.slow]


class Training:
    """A small run of a few rollouts with a checkpoint after each, and what it has written so far."""

    def __init__(self, folder: Path, run: Run) -> None:
        self.folder = folder
        self.run = run

    @property
    def steps(self) -> list[int]:
        """Steps in metrics.jsonl."""
        lines = [line for file in self.folder.glob("work/2*/metrics.jsonl") for line in file.read_text().splitlines()]
        return [json.loads(line)["step"] for line in lines]

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("work/2*/hf-*"))

    def fingerprint(self) -> dict[str, str]:
        """Of every file of hf-final."""
        (final,) = self.folder.glob("work/2*/hf-final")
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in final.iterdir()}

    def saw(self, words: str) -> bool:
        return words in self.run.stderr

    def end(self) -> int:
        return self.run.process.wait(240)


@contextlib.contextmanager
def training(folder: Path, *flags: str) -> Iterator[Training]:
    model = folder.parent / "model"
    if not model.exists():
        make_checkpoint(model)
    data = write_rows(
        folder.parent / "train.jsonl", [{"prompt": f"{n}+1=?", "ground_truth": str(n + 1)} for n in range(8)]
    )
    command = [
        *("-m", "xrl.cli", "train", *run_flags(model, data, folder)),
        *("--judge", f"{Path(__file__).with_name('digits_judge.py')}:reward", "--lr", "1e-3", "--no-tensorboard"),
        *("--num-rollouts", str(NUM_ROLLOUTS), "--save-interval", "1", "--save-keep", "1", *flags),
    ]
    with started(folder, *command) as run:
        yield Training(folder, run)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, str]]:
    """hf-final of the same run on a disk with room."""

    def fingerprint(*flags: str) -> dict[str, str]:
        with training(tmp_path_factory.mktemp("undisturbed") / "run", *flags) as run:
            assert run.end() == 0, run.run.stderr[-4000:]
            return run.fingerprint()

    return fingerprint


def test_a_run_folder_that_cannot_be_written_for_a_while_costs_a_run_nothing(
    tmp_path: Path, undisturbed: Callable[..., dict[str, str]]
) -> None:
    with training(tmp_path / "run") as run:
        run.run.wait_for(lambda: run.steps)
        (folder,) = (tmp_path / "run" / "work").iterdir()
        folder.rename(tmp_path / "away")
        folder.write_text("in its place")
        run.run.wait_for(lambda: run.saw("the trained weights wait in memory"))
        folder.unlink()
        (tmp_path / "away").rename(folder)
        assert run.end() == 0, run.run.stderr[-4000:]
        assert run.steps == list(range(1, NUM_ROLLOUTS + 1))
        assert "Traceback" not in run.run.stderr and run.saw("could not be written to the end; the answers of ")
        assert not list(folder.glob(".hf-*"))
        assert run.fingerprint() == undisturbed()


@pytest.mark.cluster
@pytest.mark.distributed
@pytest.mark.parametrize("flags", [(), TWO_RANKS], ids=["one rank", "two ranks"])
def test_a_disk_that_is_full_for_a_while_costs_a_run_nothing(
    tmp_path: Path, undisturbed: Callable[..., dict[str, str]], flags: tuple[str, ...]
) -> None:
    with small_disk(tmp_path / "run" / "work"), training(tmp_path / "run", *flags) as run:
        run.run.wait_for(lambda: run.steps)
        fill(tmp_path / "run" / "work" / "full")
        run.run.wait_for(lambda: run.saw("the trained weights wait in memory"))
        assert "No space left on device" in run.run.stderr and "hf-final" not in run.checkpoints
        (tmp_path / "run" / "work" / "full").unlink()
        assert run.end() == 0, run.run.stderr[-4000:]
        assert run.steps == list(range(1, NUM_ROLLOUTS + 1))
        assert run.fingerprint() == undisturbed(*flags)


@pytest.mark.cluster
@pytest.mark.distributed
@pytest.mark.parametrize("flags", [(), TWO_RANKS], ids=["one rank", "two ranks"])
def test_a_disk_that_stays_full_ends_a_run_with_one_sentence(tmp_path: Path, flags: tuple[str, ...]) -> None:
    work = tmp_path / "run" / "work"
    with small_disk(work), training(tmp_path / "run", "--save-retry-minutes", "0.05", *flags) as run:
        run.run.wait_for(lambda: run.steps)
        fill(work / "full")
        assert run.end() == 1
        said = [line for line in run.run.stderr.splitlines() if line.startswith("xrl: error: ")]
        assert len(said) == 1 and "Traceback" not in run.run.stderr, run.run.stderr[-4000:]
        assert str(work) in said[0] and "hf-final cannot be written: No space left on device" in said[0]
        assert "hf-final" not in run.checkpoints and not list(work.glob("2*/.hf-*"))


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A disk of a few megabytes, mounted here."""
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        if NEED_NAMESPACES in os.environ:
            pytest.fail(f"this user cannot mount a disk: {mounted.stderr.decode()}")
        pytest.skip("this user cannot mount a disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(file: Path) -> None:
    """Write until the disk is full."""
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as stream:
        while stream.write(bytes(4096)):
            pass
