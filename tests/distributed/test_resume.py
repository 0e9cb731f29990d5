"""A run that was interrupted and goes on ends as one that was not: the same weights and metrics, to the bit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launch import run_ranks
from tests.small_runs import write_rows
from tests.tiny_models import make_checkpoint
from xrl.metrics.sinks import read_rows

WORKER = Path(__file__).with_name("resume_worker.py")
JUDGE = Path(__file__).parents[1] / "e2e" / "digits_judge.py"
NUM_ROLLOUTS = 5

# name -> model, ranks, flags
RUNS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "1 rank": ("dense", 1, ("--lr-decay-style", "linear")),
    "fused log-probs, four updates, KL": (
        "dense",
        1,
        ("--fused-linear-logprob", "--updates-per-rollout", "4", "--kl-coef", "0.1"),
    ),
    "partial rollouts, cut by counts": ("dense", 1, ("--partial-rollout", "--partial-rollout-tokens", "4")),
    "tp2pp2": ("dense", 4, ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2")),
    "dp2, distributed optimizer": ("dense", 2, ("--use-distributed-optimizer", "--lr-warmup-iters", "3")),
    "ep2": ("experts", 2, ("--expert-model-parallel-size", "2")),
}

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "dense": make_checkpoint(folder / "dense", family="qwen3", tied=True),
        "experts": make_checkpoint(folder / "experts", family="qwen3_moe"),
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"prompt": f"{number}+1=?", "ground_truth": str(number + 1)} for number in range(10)]
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", rows)


def flags(model: Path, data: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        *("--model", str(model), "--data", str(data), "--run-dir", str(run_dir)),
        *("--judge", f"{JUDGE}:reward", "--judge-num-workers", "1", "--rollout-num-workers", "1"),
        *("--rollout-num-threads", "1", "--rollout-batch-size", "4", "--samples-per-prompt", "4"),
        *("--max-prompt-length", "32", "--max-response-length", "16", "--max-tokens-per-microbatch", "512"),
        *("--num-rollouts", str(NUM_ROLLOUTS), "--lr", "1e-3", "--state-interval", "1"),
        *("--eval-data", str(data), "--eval-interval", "2", "--eval-samples-per-prompt", "1"),
        *more,
    ]


def repeatable(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics, but for what is measured."""
    measured = ("seconds", "tokens_per_s", "memory")
    return [
        {name: value for name, value in row.items() if not any(word in name for word in measured)}
        for row in read_rows(run_dir / "metrics.jsonl")
    ]


def model_hash(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "hf-final" / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("name", RUNS)
def test_interrupted_and_gone_on_is_never_interrupted(
    name: str, models: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    kind, num_ranks, more = RUNS[name]
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    run_ranks(WORKER, num_ranks, *flags(models[kind], data, straight, *more))
    for end_behind in (2, 4):
        run_ranks(WORKER, num_ranks, *flags(models[kind], data, broken, *more), f"--end-behind={end_behind}")
        assert not (broken / "hf-final").exists()
    run_ranks(WORKER, num_ranks, *flags(models[kind], data, broken, *more))
    assert repeatable(broken) == repeatable(straight)
    assert model_hash(broken) == model_hash(straight)
    final = f"state/step-{NUM_ROLLOUTS}"
    for file in sorted((straight / final).glob("*.safetensors")):
        assert (broken / final / file.name).read_bytes() == file.read_bytes(), file.name
    assert [path.name for path in sorted((broken / "state").iterdir())] == ["step-4", "step-5"]
    saved = json.loads((broken / final / "manifest.json").read_text())
    assert saved["parts"]["experience"]["prompts"]["epoch"] == 2
