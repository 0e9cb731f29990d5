"""A run that is asked to stop, by whatever and wherever, ends with exit code 75 and says so in status.json."""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.e2e.test_shutdown import TWO_RANKS, own_lines, process_of, training
from tests.launch.processes import Run, started
from tests.small_runs import run_flags, write_rows
from tests.tiny_models import make_checkpoint
from xrl.launch.stop import EXIT_STOPPED
from xrl.metrics.status import Status

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.distributed]

DIGITS = Path(__file__).with_name("digits_judge.py")
TRAIN = ("-m", "xrl.cli", "train")
RANKS = pytest.mark.parametrize("ranks", [(), TWO_RANKS], ids=["1 rank", "2 ranks"])
MORE = pytest.mark.cluster  # more of the same: `make test-cluster` has the time for it
MOMENTS = (
    (0.1, signal.SIGTERM),
    (0.5, signal.SIGUSR1),
    (1.0, signal.SIGTERM),
    (2.0, signal.SIGUSR2),
    (4.0, signal.SIGINT),
    (8.0, signal.SIGUSR1),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


def endless(model: Path, folder: Path) -> list[str]:
    """The flags of a run that would train for hours."""
    data = write_rows(folder / "train.jsonl", [{"prompt": "1+1=?", "ground_truth": "2"}] * 8)
    flags = [*run_flags(model, data, folder), "--num-rollouts", "100000", "--on-nothing-learned", "warn"]
    return [*flags, "--no-tensorboard"]


def folder_of(folder: Path) -> Path:
    (found,) = (folder / "work").iterdir()
    return found


def status_of(folder: Path) -> Status:
    found = Status.read(folder_of(folder) / "status.json")
    assert found is not None
    return found


def temporary_folder(run: Run) -> Path:
    """Of the command above two ranks."""
    error_file = Path(process_of(run, "xrl.train", RANK="0").environ()["TORCHELASTIC_ERROR_FILE"])
    return error_file.parents[3]


def has_stopped(run: Run, folder: Path, cause: str) -> None:
    """It ended as a run that is asked to stop does, and told everybody."""
    assert "Traceback" not in run.stderr and "torch" not in run.stderr
    *_, line = own_lines(run)
    assert line.startswith(f"xrl: stopped by {cause} after rollout ")
    status = status_of(folder)
    assert status.state == "saved" and f"xrl: {status.sentence}" == line
    state = folder_of(folder) / "state" / f"step-{status.step}"
    assert line.endswith(f"; state saved in {state}") and (state / "manifest.json").is_file()
    assert status.step >= 1 and f" after rollout {status.step:,} of 100,000; " in line


@pytest.mark.parametrize(
    ("number", "ranks"),
    [
        (signal.SIGUSR1, TWO_RANKS),
        pytest.param(signal.SIGINT, (), marks=MORE),
        *(pytest.param(number, (), marks=MORE) for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)),
        *(pytest.param(number, TWO_RANKS, marks=MORE) for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)),
    ],
)
def test_signal_to_the_command_stops_the_run(
    model: Path, tmp_path: Path, number: signal.Signals, ranks: tuple[str, ...]
) -> None:
    with training(model, tmp_path, *TRAIN, *ranks) as run:
        assert status_of(tmp_path).state == "running"
        assert run.end(run.process.pid, number) == EXIT_STOPPED
        has_stopped(run, tmp_path, number.name)
        assert (number == signal.SIGINT) == ("xrl: stopping at the end of this step; Ctrl-C again" in run.stderr)


@pytest.mark.parametrize(
    ("rank", "number"),
    [
        pytest.param("1", signal.SIGUSR1, marks=MORE),
        pytest.param("0", signal.SIGUSR1, marks=MORE),
        pytest.param("1", signal.SIGTERM, marks=MORE),
    ],
)
def test_signal_to_any_rank_stops_the_run(model: Path, tmp_path: Path, rank: str, number: signal.Signals) -> None:
    with training(model, tmp_path, *TRAIN, *TWO_RANKS) as run:
        assert run.end(process_of(run, "xrl.train", RANK=rank).pid, number) == EXIT_STOPPED
        has_stopped(run, tmp_path, number.name)


@MORE
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_to_every_process_as_a_scheduler_sends_it_stops_the_run(
    model: Path, tmp_path: Path, number: signal.Signals
) -> None:
    with training(model, tmp_path, *TRAIN, *TWO_RANKS) as run:
        for process in run.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        assert run.end(run.process.pid, number) == EXIT_STOPPED
        has_stopped(run, tmp_path, number.name)


@MORE
def test_signal_to_a_worker_is_no_news_and_the_run_goes_on(model: Path, tmp_path: Path) -> None:
    with training(model, tmp_path, *TRAIN) as run:
        worker = process_of(run, "xrl.rollout.worker")
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
            worker.send_signal(number)
        seen = len(list(folder_of(tmp_path).glob("rollout_idx_*")))
        run.wait_for(lambda: len(list(folder_of(tmp_path).glob("rollout_idx_*"))) > seen + 1)
        assert worker.is_running() and "rollout worker" not in run.stderr
        assert run.end(run.process.pid, signal.SIGUSR1) == EXIT_STOPPED


@MORE
@RANKS
def test_a_file_in_the_run_folder_stops_the_run(model: Path, tmp_path: Path, ranks: tuple[str, ...]) -> None:
    with training(model, tmp_path, *TRAIN, *ranks) as run:
        file = folder_of(tmp_path) / "stop"
        file.touch()
        assert run.process.wait(60) == EXIT_STOPPED
        has_stopped(run, tmp_path, f"the file {file}")


@MORE
def test_a_run_whose_time_is_over_stops_by_itself(model: Path, tmp_path: Path) -> None:
    with started(tmp_path / "output", *TRAIN, *endless(model, tmp_path), "--exit-before", "20s") as run:
        assert run.process.wait(120) == EXIT_STOPPED
        assert own_lines(run)[-1].startswith("xrl: stopped by --exit-before 20s ")
        assert status_of(tmp_path).state == "saved"


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=MORE)])
def test_the_second_signal_ends_everything_at_once(model: Path, tmp_path: Path, number: signal.Signals) -> None:
    with training(model, tmp_path, *TRAIN, *TWO_RANKS) as run:
        process_of(run, "xrl.train", RANK="1").suspend()  # no step ends any more
        run.process.send_signal(number)
        run.wait_for((temporary_folder(run) / "xrl-asked-to-stop").exists)
        assert run.end(run.process.pid, number) == 128 + number
        assert own_lines(run)[-1].startswith(f"xrl: stopped by {number.name} ")
        assert status_of(tmp_path).state in ("running", "failed")


def test_plain_torchrun_that_is_told_to_end_lets_the_run_stop(model: Path, tmp_path: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "xrl.train")
    with training(model, tmp_path, *torchrun, "--tensor-model-parallel-size", "2") as run:
        run.end(run.process.pid, signal.SIGTERM)
        (line,) = own_lines(run)
        assert line.startswith("xrl: stopped by SIGTERM after rollout ")
        assert status_of(tmp_path).state == "saved" and status_of(tmp_path).sentence in line


@pytest.mark.parametrize(
    ("seconds", "number", "ranks"),
    [
        (0.1, signal.SIGTERM, ()),
        (2.0, signal.SIGUSR2, TWO_RANKS),
        *(pytest.param(seconds, number, ranks, marks=MORE) for seconds, number in MOMENTS for ranks in ((), TWO_RANKS)),
    ],
)
def test_signal_during_the_start_never_ends_in_a_traceback(
    model: Path, tmp_path: Path, ranks: tuple[str, ...], number: signal.Signals, seconds: float
) -> None:
    with started(tmp_path / "output", *TRAIN, *ranks, *endless(model, tmp_path)) as run:
        time.sleep(seconds)
        code = run.end(run.process.pid, number)
        assert code in (EXIT_STOPPED, 128 + number, -number)
        assert "Traceback" not in run.stderr
        for status in tmp_path.glob("work/*/status.json"):
            found = Status.read(status)
            assert found is not None and (found.state == "saved") == (code == EXIT_STOPPED)


@MORE
def test_a_run_that_comes_to_its_end_says_so(model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "train.jsonl", [{"prompt": "1+1=?", "ground_truth": "2"}] * 8)
    flags = [*run_flags(model, data, tmp_path), "--num-rollouts", "1", "--no-tensorboard"]
    with started(tmp_path / "output", *TRAIN, *flags) as run:
        assert run.process.wait(120) == 0, run.stderr
    assert status_of(tmp_path) == Status(state="done", step=1, sentence="")


@MORE
def test_a_rank_that_is_killed_is_named_in_the_status(model: Path, tmp_path: Path) -> None:
    with training(model, tmp_path, *TRAIN, *TWO_RANKS) as run:
        assert run.end(process_of(run, "xrl.train", RANK="0").pid, signal.SIGKILL) == 1
        status = status_of(tmp_path)
        assert status.state == "failed" and status.sentence.startswith("rank 0 was ended by SIGKILL")


@MORE
def test_a_run_that_was_stopped_again_and_again_ends_with_the_same_model(model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "train.jsonl", [{"prompt": f"{n}+1=?", "ground_truth": f"{n + 1}"} for n in range(8)])
    flags = [*run_flags(model, data, tmp_path), "--num-rollouts", "30", "--on-nothing-learned", "warn"]
    flags += ["--lr", "0.01", "--no-tensorboard", "--judge", f"{DIGITS}:reward"]

    def attempt(folder: Path, *, stops_after: int | None) -> int:
        """An attempt at the run, asked to stop when that rollout is sampled; its exit code."""
        with started(tmp_path / "output", *TRAIN, *flags, "--run-dir", str(folder)) as run:
            if stops_after is not None:
                run.wait_for((folder / f"rollout_idx_{stops_after}_trajectory.jsonl").exists)
                run.process.send_signal(signal.SIGUSR1)
            code = run.process.wait(240)
            assert "Traceback" not in run.stderr
            return code

    def final(folder: Path) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in (folder / "hf-final").glob("*.safetensors")}

    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert attempt(straight, stops_after=None) == 0
    assert [attempt(stopped, stops_after=after) for after in (3, 12)] == [EXIT_STOPPED] * 2
    assert attempt(stopped, stops_after=None) == 0
    assert final(straight) and final(stopped) == final(straight)
    assert Status.read(stopped / "status.json") == Status(state="done", step=30, sentence="")
