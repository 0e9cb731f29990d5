"""Matrix products of the training pass on the CPU, with their gradients.

By our own kernel where it has vector instructions, else `torch.nn.functional.linear`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from xrl.kernels.arguments import check_floats, check_tensor
from xrl.kernels.matmul import has_matmul, matmul, matmul_into


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """[..., in_features] times [out_features, in_features] -> [..., out_features]; differentiable in both.

    Raises:
        ValueError: shapes, types or devices that do not fit together.
        TypeError: what should be a tensor is none.
    """
    check_floats("x", x)
    check_tensor("weight", weight, (None, x.shape[-1]), like=x)
    if x.numel() == 0 or not has_matmul(x, weight):
        return F.linear(x, weight)
    out: Tensor = _CpuLinear.apply(x.reshape(-1, x.shape[-1]), weight)
    return out.view(*x.shape[:-1], weight.shape[0])


class _CpuLinear(torch.autograd.Function):
    """x [M, K], weight [N, K]"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return matmul(x, weight.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad = grads[0]
        needs_x, needs_weight = ctx.needs_input_grad
        grad_x = matmul(grad, weight) if needs_x else None
        grad_weight = weight_gradient(grad, x, weight) if needs_weight else None
        return grad_x, grad_weight


@dataclass(frozen=True)
class GradientDestination:
    """Where a kernel adds a parameter's gradient, and what autograd then gets of it."""

    buffer: Tensor
    result: Tensor | None


def gradient_destination(parameter: Tensor) -> GradientDestination:
    """Megatron's gradient buffer where there is one of the same type, which autograd does not see; else zeros."""
    main_grad: Tensor | None = getattr(parameter, "main_grad", None)
    if main_grad is not None and main_grad.dtype == parameter.dtype and main_grad.is_contiguous():
        check_tensor("main_grad", main_grad, parameter.shape, like=parameter)
        return GradientDestination(main_grad, None)
    zeros = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
    return GradientDestination(zeros, zeros)


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor | None:
    """grad^T x of y = x W^T, added to Megatron's gradient buffer where there is one; then nothing is left to return.

    Args:
        grad, x: [M, N], [M, K]
        weight: [N, K], for its buffer
    """
    main_grad: Tensor | None = getattr(weight, "main_grad", None)
    if main_grad is None or main_grad.dtype != grad.dtype:
        return matmul(grad.t(), x)
    if has_matmul(grad, x, main_grad):
        matmul_into(grad.t(), x, main_grad, addend=main_grad)
    else:
        main_grad.addmm_(grad.t(), x)
    return None
