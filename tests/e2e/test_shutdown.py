"""Whatever ends a run, Ctrl-C or the death of any of its processes, all of it is gone within 15 seconds."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.launch.processes import Run, started
from tests.small_runs import run_flags, write_rows
from tests.tiny_models import make_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.distributed]

TWO_RANKS = ("--nproc-per-node", "2", "--tensor-model-parallel-size", "2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


@contextlib.contextmanager
def training(model: Path, folder: Path, *start: str) -> Iterator[Run]:
    """A run that would train for hours, after its first rollout; two rollout workers, and judges in processes."""
    data = write_rows(folder / "train.jsonl", [{"prompt": "1+1=?", "ground_truth": "2"}] * 8)
    flags = [*run_flags(model, data, folder), "--num-rollouts", "100000", "--judge", "math-verify"]
    flags += ["--on-nothing-learned", "warn"]
    with started(folder / "output", *start, *flags, "--rollout-num-workers", "2", "--no-tensorboard") as run:
        run.wait_for(lambda: list((folder / "work").glob("*/rollout_idx_1_trajectory.jsonl")))
        yield run


def process_of(run: Run, *words: str, **variables: str) -> psutil.Process:
    """The process of the run with these words on its command line and these environment variables."""

    def is_meant(process: psutil.Process) -> bool:
        try:
            return set(words) <= set(process.cmdline()) and variables.items() <= process.environ().items()
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            return False  # it ended just now, and its parent has yet to notice

    (found, *_) = filter(is_meant, run.children())
    return found


def own_lines(run: Run) -> list[str]:
    return [line for line in run.stderr.splitlines() if line.startswith("xrl: ")]


def says_what_is_left(line: str, folder: Path) -> bool:
    """Whether the line names the run's folder, and says that no checkpoint is in it."""
    (run_folder,) = (folder / "work").iterdir()
    return f" of 100,000; run folder {run_folder}; no checkpoint yet (--state-interval" in line or (
        f"before the first rollout was learned from; run folder {run_folder}; no checkpoint yet" in line
    )


@pytest.mark.parametrize("ranks", [(), TWO_RANKS], ids=["1 rank", "2 ranks"])
def test_a_terminal_that_goes_ends_everything_with_one_line(
    model: Path, tmp_path: Path, ranks: tuple[str, ...]
) -> None:
    with training(model, tmp_path, "-m", "xrl.cli", "train", *ranks) as run:
        assert run.end(run.process.pid, signal.SIGHUP) == 128 + signal.SIGHUP
        (line,) = own_lines(run)
        assert line.startswith("xrl: stopped by SIGHUP ") and says_what_is_left(line, tmp_path)
        assert "Traceback" not in run.stderr and "torch" not in run.stderr


@pytest.mark.parametrize("rank", ["0", "1"])
def test_death_of_a_rank_ends_everything_and_is_named(model: Path, tmp_path: Path, rank: str) -> None:
    with training(model, tmp_path, "-m", "xrl.cli", "train", *TWO_RANKS) as run:
        assert run.end(process_of(run, "xrl.train", RANK=rank).pid, signal.SIGKILL) == 1
        line, rest = own_lines(run)
        assert line.startswith(f"xrl: error: rank {rank} was ended by SIGKILL")
        assert rest.startswith("xrl: ended ") and says_what_is_left(rest, tmp_path)
        assert "Traceback" not in run.stderr and "torch" not in run.stderr


def test_death_of_every_rollout_worker_ends_everything_and_is_named(model: Path, tmp_path: Path) -> None:
    command = ("-m", "xrl.cli", "train", *TWO_RANKS, "--rollout-max-restarts", "0")
    with training(model, tmp_path, *command) as run:
        process_of(run, "xrl.rollout.worker").kill()
        run.wait_for(lambda: "rollout worker" in run.stderr)
        assert run.end(process_of(run, "xrl.rollout.worker").pid, signal.SIGKILL) == 1
        line, rest = own_lines(run)
        assert rest.startswith("xrl: ended ") and says_what_is_left(rest, tmp_path)
        assert line.startswith("xrl: error: no rollout worker is left (rollout worker 0 (127.0.0.1:")
        assert "Traceback" not in run.stderr


def test_death_of_the_command_itself_leaves_nothing_and_rank_0_says_where_things_are(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    with training(model, tmp_path, "-m", "xrl.cli", "train", *TWO_RANKS) as run:
        assert list(temporary.glob("xrl-*"))
        assert run.end(run.process.pid, signal.SIGKILL) == -signal.SIGKILL
        (line,) = own_lines(run)
        assert line.startswith("xrl: stopped by SIGTERM ") and says_what_is_left(line, tmp_path)
        assert list(temporary.glob("xrl-*")) == []


def test_death_of_a_rank_of_plain_torchrun_ends_everything(model: Path, tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "xrl.train")
    with training(model, tmp_path, *torchrun, "--tensor-model-parallel-size", "2") as run:
        assert run.end(process_of(run, "xrl.train", RANK="1").pid, signal.SIGKILL) == 1
        assert "SIGKILL" in run.stderr  # torchrun names the rank
        (line,) = own_lines(run)
        assert line.startswith("xrl: stopped by SIGTERM ") and says_what_is_left(line, tmp_path)
