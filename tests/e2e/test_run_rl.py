"""examples/run_rl.sh: five words and training starts, or one sentence says what is wrong with them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small_runs import write_rows
from tests.tiny_models import make_checkpoint

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """CONFIG ENGINE MODEL DATA, all sound; the model is an empty folder."""
    (tmp_path / "config.yaml").write_text(
        f"rollout_batch_size: 2\nsamples_per_prompt: 2\nmax_prompt_length: 32\nmax_response_length: 8\n"
        f"num_rollouts: 2\nwork_dir: {tmp_path / 'work'}\n"
    )
    (tmp_path / "model").mkdir()
    data = write_rows(tmp_path / "train.jsonl", [{"prompt": "1+1=?", "ground_truth": "2"}] * 8)
    return [str(tmp_path / "config.yaml"), "embedded", str(tmp_path / "model"), str(data)]


def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", "examples/run_rl.sh", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment | variables,
        timeout=300,
    )


def refusal(*words: str, **variables: str) -> str:
    found = run(*words, **variables)
    (line,) = found.stderr.splitlines()
    assert found.returncode == 2 and found.stdout == ""
    return line


def test_number_of_arguments_is_checked(words: list[str]) -> None:
    assert "needs 4 or 5 arguments, found 3" in refusal(*words[:3])
    assert "needs 4 or 5 arguments, found 0" in refusal()


@pytest.mark.parametrize(("place", "name"), [(0, "CONFIG"), (2, "MODEL"), (3, "DATA")])
def test_missing_path_is_named(words: list[str], place: int, name: str) -> None:
    words[place] = "nowhere"
    assert refusal(*words).startswith(f"run_rl.sh: error: {name} nowhere is not a ")


def test_missing_evaluation_data_is_named(words: list[str]) -> None:
    assert "EVAL_DATA nowhere is not a file" in refusal(*words, "nowhere")


def test_number_of_ranks_is_checked(words: list[str]) -> None:
    assert "NPROC must be a whole number >= 1, found 'all'" in refusal(*words, NPROC="all")


def test_what_the_command_refuses_is_passed_on(words: list[str]) -> None:
    assert refusal(*words) == f"xrl: error: --model {words[2]} has no config.json: give a Hugging Face folder"
    assert "--engine 'vllm' is unknown" in refusal(words[0], "vllm", *words[2:])
    assert "--seed needs a whole number" in refusal(*words, "--", "--seed", "one")


def test_nearest_engine_is_named(words: list[str]) -> None:
    assert "(the nearest is lmdeploy)" in refusal(words[0], "lmdeply", *words[2:])


def test_interpreter_of_the_clone_is_found_without_an_active_environment(tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "clone" / "examples").mkdir(parents=True)
    shutil.copy(ROOT / "examples" / "run_rl.sh", tmp_path / "clone" / "examples")
    python = tmp_path / "clone" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho the clone ran: $2 $3\n")
    python.chmod(0o755)
    found = subprocess.run(
        ["bash", str(tmp_path / "clone" / "examples" / "run_rl.sh"), *words],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert found.stdout == "the clone ran: xrl.cli train\n", found.stderr


@pytest.mark.slow
def test_five_words_train_a_model(words: list[str], tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model")
    found = run(*words, words[3], "--", "--num-rollouts", "1")
    assert found.returncode == 0, found.stderr
    (folder,) = (tmp_path / "work").iterdir()
    assert (folder / "hf-final" / "config.json").exists()
    assert len(list(folder.glob("rollout_idx_*"))) == 1
