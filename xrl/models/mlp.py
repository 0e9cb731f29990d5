"""SwiGLU as the activation slot of megatron-core's MLP."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from xrl.kernels.layer_ops import swiglu


class SwiGLU(torch.nn.Module):
    """[..., 2 H] gate before up -> [..., H]"""

    def __init__(self, config: TransformerConfig, **_: object) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x)
