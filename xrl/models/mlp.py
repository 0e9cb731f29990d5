"""SwiGLU as megatron-core's MLP has it, and that MLP as one operation where we have a kernel for it."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import mlp as megatron
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from xrl.kernels.layers.gated_mlp import gated_mlp
from xrl.kernels.layers.layer_ops import swiglu
from xrl.models.linear import ColumnParallelLinear, RowParallelLinear


class SwiGLU(torch.nn.Module):
    """[..., 2 H] gate before up -> [..., H]"""

    def __init__(self, config: TransformerConfig, **_: object) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x)


class GatedMLP(megatron.MLP):
    """Same parameters, same communication, in one operation; for the CPU, with our own linear layers."""

    linear_fc1: ColumnParallelLinear
    linear_fc2: RowParallelLinear

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor | None]:
        """[S, B, H] -> [S, B, H] and the bias, which these models do not have."""
        x = self.linear_fc1.spread(hidden_states)
        return self.linear_fc2.combine(gated_mlp(x, self.linear_fc1.weight, self.linear_fc2.weight)), None
