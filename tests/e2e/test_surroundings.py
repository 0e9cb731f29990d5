"""Whole runs in surroundings that a user did not choose: leftovers, shadows, closed streams, few open files."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small_runs import run_flags, write_rows
from tests.tiny_models import make_checkpoint

ROOT = Path(__file__).resolve().parents[2]
JUDGE = f"{Path(__file__).with_name('digits_judge.py')}:reward"
COMMAND = [sys.executable, "-P", "-c", "from xrl.cli import main; main()", "train"]
ROWS = [{"prompt": f"{n}+1=?", "ground_truth": str(n + 1)} for n in range(8)]

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def environment(**variables: str) -> dict[str, str]:
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **own, **variables}


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_run_does_not_care_where_it_was_started(tmp_path: Path, num_ranks: int) -> None:
    """In a folder whose name is not UTF-8 and whose modules hide others, as if it were a rank of another launcher, with
    standard output closed, a log whose reader leaves after the first line, and warnings that are errors."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/d\xe9mo"))
    folder.mkdir()
    for name in ("queue.py", "logging.py", "types.py", "json/__init__.py", "datasets/__init__.py", "xrl.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("raise ImportError('not this one')\n")
    flags = run_flags(make_checkpoint(tmp_path / "model"), write_rows(folder / "train.jsonl", ROWS), folder)
    layout = ["--nproc-per-node", str(num_ranks), "--tensor-model-parallel-size", str(num_ranks)]
    process = subprocess.Popen(
        [*COMMAND, *flags, *layout, "--judge", JUDGE, "--num-rollouts", "2"],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=folder,
        env=environment(
            PYTHONWARNINGS="error",
            RANK="1",
            WORLD_SIZE="4",
            LOCAL_RANK="1",
            LOCAL_WORLD_SIZE="4",
            PET_NNODES="2",
            MASTER_ADDR="10.255.255.1",
            MASTER_PORT="29500",
            TORCHELASTIC_RUN_ID="another",
        ),
        preexec_fn=lambda: os.close(1),
    )
    assert process.stderr is not None
    first_line = process.stderr.readline()
    process.stderr.close()
    assert process.wait(400) == 0, first_line
    (run,) = (folder / "work").iterdir()
    assert (run / "hf-final" / "config.json").exists()
    assert (run / "tensorboard").exists() and (run / "reward_curve.png").exists()
    assert json.loads((run / "environment.json").read_text())["command_line"]


def test_evaluation_of_many_prompts_needs_few_open_files(tmp_path: Path) -> None:
    """More prompts than files may be open, though a worker would take them all at once."""
    num_prompts, few = 320, 256
    data = write_rows(tmp_path / "train.jsonl", ROWS)
    held_out = [{"prompt": f"{n}+1=?", "ground_truth": str(n + 1)} for n in range(num_prompts)]
    flags = run_flags(make_checkpoint(tmp_path / "model"), data, tmp_path)
    flags += ["--eval-data", str(write_rows(tmp_path / "eval.jsonl", held_out)), "--eval-samples-per-prompt", "1"]
    flags += ["--num-rollouts", "1", "--max-response-length", "2", "--judge", JUDGE, "--no-tensorboard"]
    flags += ["--rollout-max-batch-size", str(num_prompts), "--canary-tokens", "0"]
    rates: list[list[tuple[float, float]]] = []
    limits = (few, min(20_000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    runs = [
        subprocess.Popen(
            [*COMMAND, *flags, "--work-dir", str(tmp_path / str(hard))],
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
            preexec_fn=lambda hard=hard: resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard)),
        )
        for hard in limits
    ]
    try:
        for hard, run in zip(limits, runs, strict=True):
            _, log = run.communicate(timeout=400)
            assert run.returncode == 0, log[-4000:]
            assert "failed" not in log
            assert ("because of the limit of open files" in log) == (hard == few)
            (metrics,) = (tmp_path / str(hard)).glob("*/metrics.jsonl")
            rows = [json.loads(line) for line in metrics.read_text().splitlines()]
            rates += [[(row["eval/greedy"], row["eval/greedy/prompts"]) for row in rows if "eval/greedy" in row]]
    finally:
        for run in runs:
            run.kill()
    assert rates[0] == rates[1] and rates[0][0][0] > 0 and rates[0][0][1] == num_prompts
