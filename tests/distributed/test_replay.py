"""A recorded step, trained again, comes out as it was logged: to the bit at the layout of the run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launch import run_ranks
from tests.distributed.test_resume import WORKER, data, flags, models  # noqa: F401

REPLAY = Path(__file__).parents[2] / "xrl" / "replay.py"

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize(
    ("num_ranks", "more"),
    [
        (1, ("--updates-per-rollout", "2", "--kl-coef", "0.1", "--lr-decay-style", "linear")),
        (2, ("--tensor-model-parallel-size", "2")),
    ],
    ids=["1 rank", "tp2"],
)
def test_a_recorded_step_repeats(
    num_ranks: int,
    more: tuple[str, ...],
    models: dict[str, Path],  # noqa: F811
    data: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    recorded = ("--record-samples", "--state-keep", "9", *more)
    run_ranks(WORKER, num_ranks, *flags(models["dense"], data, run_dir, *recorded))
    for step in (1, 4):
        run_ranks(REPLAY, num_ranks, run_dir, "--step", step)
    # Other samples are not what was learned from.
    (run_dir / "samples" / "step-3.safetensors").write_bytes((run_dir / "samples" / "step-2.safetensors").read_bytes())
    words = [sys.executable, "-m", "xrl.cli", "replay", str(run_dir), "--step", "3"]
    found = subprocess.run(words, cwd=REPLAY.parents[1], capture_output=True, text=True)
    assert found.returncode == 1, found.stderr
    assert "metrics are equal to the bit" in found.stdout and "loss: " in found.stdout
