"""Decoder layers in one call give whole models the logits and gradients of megatron-core's own way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.launch import run_ranks
from xrl.kernels.matmul import has_matmul

WORKER = Path(__file__).with_name("layer_worker.py")


@pytest.mark.slow
@pytest.mark.skipif(not has_matmul(torch.ones(1, 1)), reason="no compiled products for this machine")
def test_models_of_layers_in_one_call_equal_megatrons_way() -> None:
    run_ranks(WORKER, 1)
