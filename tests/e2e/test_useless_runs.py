"""Runs of which nothing can come end with an error, and leave no model behind that looks like a result."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.small_runs import run_flags, write_rows
from tests.tiny_models import make_checkpoint

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
DIGITS = f"{Path(__file__).with_name('digits_judge.py')}:reward"


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    data = write_rows(tmp_path / "train.jsonl", [{"prompt": "1+1=?", "ground_truth": "2"}] * 8)
    model = make_checkpoint(tmp_path / "model")
    return [*run_flags(model, data, tmp_path), "--num-rollouts", "1", "--no-tensorboard"]


def train(*flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "xrl.cli", "train", *flags],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment | variables,
        timeout=180,
    )


def final_models(folder: Path) -> list[Path]:
    return list(folder.glob("work/*/hf-final"))


def test_judge_that_always_fails_ends_the_run(flags: list[str], tmp_path: Path) -> None:
    judge = tmp_path / "broken.py"
    judge.write_text("def reward(response, prompt):\n    raise KeyError('answer')\n")
    found = train(*flags, "--judge", f"{judge}:reward")
    assert found.returncode == 1 and final_models(tmp_path) == []
    assert "xrl: error: rollout 1: the judge failed on 8 of 8 answers, first with KeyError: 'answer' (" in (
        found.stderr
    )
    assert "line 2, in reward)" in found.stderr and "Traceback" not in found.stderr


@pytest.mark.parametrize("clip_grad", ["1", "0"])  # where nothing is clipped, no norm is taken
def test_weights_that_are_not_finite_end_the_run(flags: list[str], tmp_path: Path, clip_grad: str) -> None:
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "down_proj" in name)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    # The canary would say it before there is a loss.
    options = ("--judge", DIGITS, "--no-filter-zero-variance", "--clip-grad", clip_grad, "--canary-tokens", "0")
    found = train(*flags, *options)
    assert found.returncode == 1 and final_models(tmp_path) == []
    assert "the update's loss is nan" in found.stderr


def test_another_launchers_ranks_are_not_ours(flags: list[str], tmp_path: Path) -> None:
    variables = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    found = train(*flags, "--judge", DIGITS, **variables)
    assert found.returncode == 0, found.stderr
    assert "2 ranks" not in found.stdout + found.stderr and len(final_models(tmp_path)) == 1
