"""The gated MLP of a decoder layer as one operation, for training on the CPU: two products around SwiGLU.

As three operations, the second product keeps SwiGLU's result for its weight's gradient. Here that is computed again,
while SwiGLU's own gradient reads the same numbers, and gradients overwrite what they were made from. Our kernel goes
through both products and SwiGLU a tile of rows at a time: what lies between them stays in the caches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from xrl.kernels.arguments import address, check_floats, check_tensor
from xrl.kernels.layers.layer_ops import is_native, reference_swiglu, swiglu_gradient_into, swiglu_into
from xrl.kernels.layers.linear import weight_gradient
from xrl.kernels.matmul import has_matmul, matmul
from xrl.kernels.native import native_module
from xrl.kernels.threads import num_threads

_MOST_PACKED_BYTES = 64 << 20


def gated_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """swiglu(x gate_up^T) down^T; differentiable in all three, once.

    Args:
        x: [..., H]
        gate_up: [2 F, H] the gate's rows before the up projection's
        down: [H, F]

    Returns:
        [..., H]

    Raises:
        ValueError: shapes, types or devices that do not fit together.
        TypeError: what should be a tensor is none.
    """
    check_floats("x", x)
    hidden = x.shape[-1]
    check_tensor("gate_up", gate_up, (None, hidden), like=x)
    if gate_up.shape[0] % 2:
        raise ValueError(f"gate_up must be [2 F, {hidden}], got {list(gate_up.shape)}")
    check_tensor("down", down, (hidden, gate_up.shape[0] // 2), like=x)
    if not is_native(x, gate_up, down) or x.numel() == 0 or down.numel() == 0:
        return reference_gated_mlp(x, gate_up, down)
    out: Tensor = _GatedMLP.apply(x.reshape(-1, x.shape[-1]).contiguous(), gate_up.contiguous(), down.contiguous())
    return out.view(*x.shape[:-1], len(down))


def reference_gated_mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The specification of `gated_mlp`."""
    return F.linear(reference_swiglu(F.linear(x, gate_up)), down)


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate_up, down)
        # Not saved: autograd would refuse that the backward pass overwrites it.
        if is_fused(x, gate_up, down):
            ctx.hidden = hidden = x.new_empty(x.shape[0], gate_up.shape[0])
            out = x.new_empty(x.shape[0], down.shape[0])
            _kernels().gated_mlp_forward(
                x=address(x),
                mlp=_weights(gate_up, down),
                rows=len(x),
                hidden=address(hidden),
                out=address(out),
                num_threads=num_threads(),
            )
            return out
        ctx.hidden = hidden = matmul(x, gate_up.t())
        activated = hidden.new_empty(len(hidden), hidden.shape[1] // 2)
        swiglu_into(hidden, activated)
        return matmul(activated, down.t())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, gate_up, down = ctx.saved_tensors
        hidden, ctx.hidden = ctx.hidden, None
        if hidden is None:
            raise RuntimeError("gated_mlp: the backward pass can run once: it overwrites what the forward pass kept")
        grad = grads[0].contiguous()
        needs_x, needs_gate_up, needs_down = ctx.needs_input_grad
        if is_fused(x, gate_up, down):
            grad_x = torch.empty_like(x) if needs_x else None
            activated = hidden.new_empty(len(hidden), down.shape[1])
            _kernels().gated_mlp_backward(
                grad=address(grad),
                mlp=_weights(gate_up, down),
                rows=len(x),
                hidden=address(hidden),
                activated=address(activated),
                grad_x=address(grad_x),
                num_threads=num_threads(),
            )
        else:
            activated = matmul(grad, down)  # its gradient, until the next line
            swiglu_gradient_into(hidden, activated, hidden, out=activated)
            grad_x = matmul(hidden, gate_up) if needs_x else None
        grad_down = weight_gradient(grad, activated, down) if needs_down else None
        grad_gate_up = weight_gradient(hidden, x, gate_up) if needs_gate_up else None
        return grad_x, grad_gate_up, grad_down


def is_fused(x: Tensor, gate_up: Tensor, down: Tensor) -> bool:
    """Whether the kernel is used: it packs both weights at every call, which must not take much memory."""
    return is_packed_whole(4 * (gate_up.numel() + down.numel())) and has_matmul(x, gate_up, down)


def is_packed_whole(num_bytes: int) -> bool:
    """Whether an MLP whose weights take so many bytes in fp32 is small enough to be packed at every call."""
    return num_bytes <= _MOST_PACKED_BYTES


def _weights(gate_up: Tensor, down: Tensor) -> tuple[int, int, int, int, int]:
    return address(gate_up), address(down), gate_up.shape[1], down.shape[1], down.shape[0]


def _kernels() -> Any:
    return native_module()
