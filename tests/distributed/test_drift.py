"""With learning rate 0 the rollout engine and the actor give the same log-probs, at every layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.launch import run_ranks
from tests.distributed.test_parity import LAYOUTS

WORKER = Path(__file__).with_name("drift_worker.py")
EXAMPLES = Path(__file__).parents[2] / "examples"
LARGEST_MEAN_MISMATCH = 1e-5
NUM_ROLLOUTS = 5

LONG_NAMES = {
    "--tp": "--tensor-model-parallel-size",
    "--pp": "--pipeline-model-parallel-size",
    "--sp": "--sequence-parallel",
    "--distributed-optimizer": "--use-distributed-optimizer",
    "--recompute": "--recompute-granularity",
}


def long_flag(flag: str) -> str:
    name, equals, value = flag.partition("=")
    return LONG_NAMES[name] + equals + value


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one", *LAYOUTS])
def test_engine_and_actor_agree_over_rollouts_without_learning(layout: str, tmp_path: Path) -> None:
    num_ranks, *flags = LAYOUTS.get(layout, (1,))
    out = tmp_path / "mismatch.json"
    run_ranks(
        WORKER,
        num_ranks,
        f"--out={out}",
        "--temperatures",
        "1.0",
        "0.7",
        f"--model={EXAMPLES / 'student'}",
        f"--data={EXAMPLES / 'data' / 'train.jsonl'}",
        f"--work-dir={tmp_path}",
        f"--num-rollouts={NUM_ROLLOUTS}",
        "--rollout-batch-size=8",
        "--samples-per-prompt=4",
        "--max-prompt-length=64",
        "--max-response-length=24",
        "--max-tokens-per-microbatch=512",
        "--lr=0",
        "--on-nothing-learned=warn",
        "--no-filter-zero-variance",
        "--no-tensorboard",
        *map(long_flag, flags),
    )
    mismatch = json.loads(out.read_text())
    for temperature in ("1.0", "0.7"):
        assert len(mismatch[temperature]) == NUM_ROLLOUTS
        assert max(mismatch[temperature]) <= LARGEST_MEAN_MISMATCH, f"T={temperature}: {mismatch[temperature]}"
