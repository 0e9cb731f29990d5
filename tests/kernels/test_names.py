"""What `xrl.kernels` offers by name."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import xrl.kernels


def test_every_name_that_is_listed_can_be_had() -> None:
    for name in xrl.kernels.__all__:
        assert getattr(xrl.kernels, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'linear'"):
        _ = xrl.kernels.linear


def test_a_loop_of_ones_own_needs_nothing_else() -> None:
    from xrl.kernels import TokenInputs, TokenLossSettings, VocabShard, grpo_token_loss

    logits = torch.zeros(2, 4, requires_grad=True)
    tokens = TokenInputs(advantages=torch.tensor([1.0, -1.0]))
    shard = VocabShard(num_columns=4)
    out = grpo_token_loss(logits * 1.0, torch.tensor([0, 3]), tokens, TokenLossSettings(), shard=shard)
    out.token_loss.sum().backward()
    assert out.token_loss.tolist() == [-1.0, 1.0]
    assert logits.grad is not None and logits.grad[0].tolist() == [-0.75, 0.25, 0.25, 0.25]


def test_importing_the_room_imports_no_torch() -> None:
    script = "import sys, xrl.kernels; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
