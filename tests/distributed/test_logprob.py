"""The kernels on a vocabulary spread over ranks give what they give on the whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launch import run_ranks

WORKER = Path(__file__).with_name("logprob_worker.py")


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_shards_give_the_log_probs_losses_and_gradients_of_the_whole(backend: str, num_ranks: int) -> None:
    run_ranks(WORKER, num_ranks, f"--backend={backend}")
