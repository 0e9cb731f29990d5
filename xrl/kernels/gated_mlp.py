"""The gated MLP of a decoder layer as one operation, for training on the CPU: two products around SwiGLU.

As three operations, the second product keeps SwiGLU's result for its weight's gradient. Here that is computed again,
while SwiGLU's own gradient reads the same numbers, and gradients overwrite what they were made from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from xrl.kernels.layer_ops import is_native, reference_swiglu, swiglu_gradient_into, swiglu_into
from xrl.kernels.linear import weight_gradient
from xrl.kernels.matmul import matmul


def gated_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """swiglu(x gate_up^T) down^T; differentiable in all three, once.

    Args:
        x: [..., H]
        gate_up: [2 F, H] the gate's rows before the up projection's
        down: [H, F]

    Returns:
        [..., H]
    """
    if not is_native(x, gate_up, down) or x.numel() == 0:
        return reference_gated_mlp(x, gate_up, down)
    out: Tensor = _GatedMLP.apply(x.reshape(-1, x.shape[-1]), gate_up, down)
    return out.view(*x.shape[:-1], len(down))


def reference_gated_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The specification of `gated_mlp`."""
    return F.linear(reference_swiglu(F.linear(x, gate_up)), down)


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        hidden = matmul(x, gate_up.t())
        activated = hidden.new_empty(len(hidden), hidden.shape[1] // 2)
        swiglu_into(hidden, activated)
        ctx.save_for_backward(x, gate_up, down)
        # Not saved: autograd would refuse that the backward pass overwrites it.
        ctx.hidden = hidden
        return matmul(activated, down.t())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, gate_up, down = ctx.saved_tensors
        hidden, ctx.hidden = ctx.hidden, None
        if hidden is None:
            raise RuntimeError("gated_mlp: the backward pass can run once: it overwrites what the forward pass kept")
        grad = grads[0].contiguous()
        needs_x, needs_gate_up, needs_down = ctx.needs_input_grad
        activated = matmul(grad, down)  # its gradient, until the next line
        swiglu_gradient_into(hidden, activated, hidden, out=activated)
        grad_down = weight_gradient(grad, activated, down) if needs_down else None
        grad_gate_up = weight_gradient(hidden, x, gate_up) if needs_gate_up else None
        grad_x = matmul(hidden, gate_up) if needs_x else None
        return grad_x, grad_gate_up, grad_down
