"""Matrix products of the training pass on the CPU, with their gradients, by whichever library is faster there.

PyTorch sends fp32 products to MKL, which leaves AVX-512 unused on CPUs that aren't Intel's: oneDNN is over twice as
fast there. Without AVX-512, MKL is the faster one. Elsewhere this is `torch.nn.functional.linear`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """[..., in_features] times [out_features, in_features] -> [..., out_features]; differentiable in both."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32 or x.numel() == 0:
        return F.linear(x, weight)
    out: Tensor = _CpuLinear.apply(x.reshape(-1, x.shape[-1]), weight)
    return out.view(*x.shape[:-1], weight.shape[0])


@cache
def onednn_is_faster() -> bool:
    """Whether oneDNN's fp32 products beat MKL's on this CPU."""
    return bool(torch.backends.mkldnn.is_available()) and torch.backends.cpu.get_cpu_capability() == "AVX512"


class _CpuLinear(torch.autograd.Function):
    """x [M, K], weight [N, K]"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        needs_x, needs_weight = ctx.needs_input_grad
        grad_x = product(grad, weight.t()) if needs_x else None
        grad_weight = weight_gradient(grad, x, weight) if needs_weight else None
        return grad_x, grad_weight


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor | None:
    """grad^T x of y = x W^T, added to Megatron's gradient buffer where there is one; then nothing is left to return.

    Args:
        grad, x: [M, N], [M, K]
        weight: [N, K], for its buffer

    MKL beats oneDNN at this product, and adds to what is there without a further pass.
    """
    main_grad: Tensor | None = getattr(weight, "main_grad", None)
    if main_grad is None or main_grad.dtype != grad.dtype:
        return grad.t() @ x
    main_grad.addmm_(grad.t(), x)
    return None


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [M, K] times weight [N, K], in any layout, transposed; without autograd."""
    if x.dtype != torch.float32 or not onednn_is_faster():
        return x @ weight.t()
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, None, "none", [], "")
