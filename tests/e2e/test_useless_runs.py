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
    judge.write_text("def reward(response, prompt):\n    raise KeyError('answer')\n\nprint('imported \\x1b[2J')\n")
    found = train(*flags, "--judge", f"{judge}:reward")
    assert found.returncode == 1 and final_models(tmp_path) == []
    assert "xrl: error: rollout 1: the judge failed on 8 of 8 answers, first with KeyError: 'answer' (" in (
        found.stderr
    )
    assert "line 2, in reward)" in found.stderr and "Traceback" not in found.stderr
    assert "imported" not in found.stdout + found.stderr
    (log,) = tmp_path.glob("work/*/logs/judge_0.log")
    assert log.read_text() == "imported \x1b[2J\n"
    assert found.stderr.splitlines()[-1].startswith("xrl: ended before the first rollout was learned from; run folder ")


@pytest.mark.distributed
def test_judge_that_never_tells_answers_apart_ends_the_run_at_the_tenth_rollout(
    flags: list[str], tmp_path: Path
) -> None:
    judge = tmp_path / "zero.py"
    judge.write_text("def reward(response, prompt):\n    return 0.0\n")
    ranks = ("--nproc-per-node", "2", "--tensor-model-parallel-size", "2")
    found = train(*ranks, *flags, "--judge", f"{judge}:reward", "--num-rollouts", "12")
    assert found.returncode == 1 and final_models(tmp_path) == []
    lines = found.stderr.splitlines()
    (warning,) = [line for line in lines if "WARNING" in line and "nothing was learned" in line]
    assert f"the last 3 rollouts: every one of 24 answers got reward 0: --judge {judge}:reward" in warning
    assert "rollout_idx 3/12" in lines[lines.index(warning) - 1]
    (said,) = [line for line in lines if line.startswith("xrl: ")]
    assert said.startswith("xrl: error: nothing was learned from the last 10 rollouts: every one of 80 answers got")
    assert "without a checkpoint, as the weights are still those of the start" in said
    assert "Traceback" not in found.stderr


def test_short_run_that_learned_nothing_ends_with_its_model_and_as_failed(flags: list[str], tmp_path: Path) -> None:
    found = train(*flags, "--judge", DIGITS, "--num-rollouts", "3", "--lr", "0")
    assert found.returncode == 1 and len(final_models(tmp_path)) == 1
    last = found.stderr.splitlines()[-1]
    assert last.startswith("xrl: error: nothing was learned from the last 3 rollouts: the learning rate was 0 in all 3")
    assert "the weights are still those of the start, also in hf-final" in last and "Traceback" not in found.stderr


def test_what_was_learned_is_saved_before_a_run_ends_that_goes_on_in_vain(flags: list[str], tmp_path: Path) -> None:
    options = ("--num-rollouts", "12", "--lr", "1e-3", "--lr-decay-style", "linear", "--lr-decay-iters", "1")
    found = train(*flags, "--judge", DIGITS, *options)
    assert found.returncode == 1 and final_models(tmp_path) == []
    assert "the weights that it came to are in hf-11" in found.stderr.splitlines()[-1]
    (saved,) = tmp_path.glob("work/*/hf-11/*.safetensors")
    before = load_file(tmp_path / "model" / "model.safetensors")
    assert any(not torch.equal(tensor, before[name]) for name, tensor in load_file(saved).items())


def test_lr_0_is_accepted_where_the_run_is_only_to_be_warned(flags: list[str], tmp_path: Path) -> None:
    found = train(*flags, "--judge", DIGITS, "--num-rollouts", "3", "--lr", "0", "--on-nothing-learned", "warn")
    assert found.returncode == 0 and len(final_models(tmp_path)) == 1
    assert found.stderr.count("nothing was learned from the last 3 rollouts") == 2  # when it is seen, and at the end


@pytest.fixture
def broken_weights(flags: list[str], tmp_path: Path) -> list[str]:
    """Flags of a run whose model has a weight that is not a number."""
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "down_proj" in name)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    # The canary would say it before there is an answer.
    return [*flags, "--judge", DIGITS, "--no-filter-zero-variance", "--canary-tokens", "0"]


@pytest.mark.parametrize("clip_grad", ["1", "0"])  # where nothing is clipped, no norm is taken
def test_weights_that_are_not_finite_end_the_run(broken_weights: list[str], tmp_path: Path, clip_grad: str) -> None:
    engine = ("--engine", "tests.e2e.faulty_engines:MendingEngine")
    found = train(*broken_weights, *engine, "--clip-grad", clip_grad, PYTHONPATH=str(ROOT))
    assert found.returncode == 1 and final_models(tmp_path) == []
    assert "the update's loss is nan" in found.stderr


def test_answers_of_weights_that_are_not_finite_are_not_trained_on(broken_weights: list[str], tmp_path: Path) -> None:
    found = train(*broken_weights)
    assert found.returncode == 1 and final_models(tmp_path) == []
    assert "output_token_logprobs[0] has log-prob nan, not a finite number" in found.stderr
    assert "Traceback" not in found.stderr


def test_another_launchers_ranks_are_not_ours(flags: list[str], tmp_path: Path) -> None:
    variables = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    found = train(*flags, "--judge", DIGITS, **variables)
    assert found.returncode == 0, found.stderr
    assert "2 ranks" not in found.stdout + found.stderr and len(final_models(tmp_path)) == 1
