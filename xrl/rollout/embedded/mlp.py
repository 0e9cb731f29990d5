"""The MLPs of the decoder: gated ones, and mixtures of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from xrl.kernels.decode.packed_linear import PackedLinear, PackedSwiGLU, padded_rows
from xrl.kernels.matmul import matmul
from xrl.models.shape import ExpertShape


@dataclass(kw_only=True)
class GatedMLP:
    """SwiGLU (arXiv:2002.05202)."""

    gate_up: PackedSwiGLU  # both projections in one product
    down: PackedLinear

    def __call__(self, h: Tensor) -> Tensor:
        """h [N, H] -> [N, H]"""
        return self.down(self.gate_up(h))

    def plus(self, h: Tensor, other: Tensor) -> Tensor:
        """The MLP of h [N, H], plus `other` [N, H]."""
        return self.down.plus(self.gate_up(h), other)

    def to(self, device: torch.device) -> GatedMLP:
        """Move in place."""
        self.gate_up.to(device)
        self.down.to(device)
        return self


class Experts:
    """Softmax routing without a shared expert, as in Qwen3-MoE.

    Args:
        router: [E, H] weight
        experts: E of them
    """

    def __init__(self, shape: ExpertShape, router: Tensor, experts: Sequence[GatedMLP]) -> None:
        self.shape = shape
        self.router = router.float()  # scores are fp32, as in training
        self.experts = list(experts)

    def plus(self, h: Tensor, other: Tensor) -> Tensor:
        """The chosen experts' weighted outputs, plus `other`; all [N, H]."""
        probs = matmul(h.float(), self.router.t()).softmax(dim=-1)
        weights, chosen = probs.topk(self.shape.experts_per_token, dim=-1)
        if self.shape.normalize_top_k:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        out = other.clone()
        for expert in chosen.unique().tolist():
            rows, choice = (chosen == expert).nonzero(as_tuple=True)
            tokens = F.pad(h[rows], (0, 0, 0, padded_rows(len(rows)) - len(rows)))
            y = self.experts[expert](tokens)[: len(rows)]
            out.index_add_(0, rows, (y * weights[rows, choice, None]).to(out.dtype))
        return out

    def to(self, device: torch.device) -> Experts:
        """Move in place."""
        self.router = self.router.to(device)
        for expert in self.experts:
            expert.to(device)
        return self
