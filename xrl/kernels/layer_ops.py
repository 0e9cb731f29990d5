"""The element-wise parts of a decoder layer, differentiable: RMSNorm, SwiGLU and rotary embedding, for training.

On the CPU each is one pass over memory, forward and backward, where plain PyTorch takes five to ten. Each public
function stands before its plain PyTorch reference, which serves every other device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from xrl.kernels.native import native_module
from xrl.kernels.threads import num_threads

_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv:1910.07467); x [..., H], weight [H]."""
    if not is_native(x, weight):
        return reference_rms_norm(x, weight, eps)
    out: Tensor = _RMSNorm.apply(x, weight, eps)
    return out


def reference_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The specification of `rms_norm`."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up (arXiv:2002.05202), with x [..., 2 H] = gate before up -> [..., H]."""
    if not is_native(x):
        return reference_swiglu(x)
    out: Tensor = _SwiGLU.apply(x)
    return out


def swiglu_into(x: Tensor, out: Tensor) -> None:
    """`swiglu` of x [..., 2 H] into out [..., H] by the kernel, without autograd; both contiguous."""
    size = out.shape[-1]
    _kernel("swiglu_forward", x.dtype)(x.data_ptr(), out.numel() // max(1, size), size, out.data_ptr(), num_threads())


def swiglu_gradient_into(x: Tensor, grad: Tensor, grad_x: Tensor, out: Tensor | None = None) -> None:
    """The gradient of `swiglu` by the kernel; all contiguous.

    Args:
        x, grad: [..., 2 H] and [..., H]
        grad_x: [..., 2 H] result; may be x
        out: [..., H] gets `swiglu(x)` once more; may be grad
    """
    size = grad.shape[-1]
    _kernel("swiglu_backward", x.dtype)(
        x.data_ptr(),
        grad.data_ptr(),
        grad.numel() // max(1, size),
        size,
        grad_x.data_ptr(),
        0 if out is None else out.data_ptr(),
        num_threads(),
    )


def reference_swiglu(x: Tensor) -> Tensor:
    """The specification of `swiglu`."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (arXiv:2104.09864) in Hugging Face's half-split order.

    Args:
        x: [T, ..., d]
        cos, sin: [T, d], of x's dtype; carry no gradient
    """
    if not is_native(x, cos, sin):
        return reference_rotary(x, cos, sin)
    out: Tensor = _Rotary.apply(x, cos, sin)
    return out


def reference_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The specification of `rotary`."""
    shape = (x.shape[0], *[1] * (x.ndim - 2), x.shape[-1])
    first, second = x.chunk(2, dim=-1)
    return x * cos.view(shape) + torch.cat((-second, first), dim=-1) * sin.view(shape)


def is_native(*tensors: Tensor) -> bool:
    """Whether the kernels of this file take such tensors together."""
    dtype = tensors[0].dtype
    return (
        dtype in _SUFFIX
        and all(tensor.device.type == "cpu" and tensor.dtype == dtype for tensor in tensors)
        and native_module() is not None
    )


def _kernel(name: str, dtype: torch.dtype) -> Callable[..., None]:
    kernel: Callable[..., None] = getattr(native_module(), f"{name}_{_SUFFIX[dtype]}")
    return kernel


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        size = x.shape[-1]
        num_rows = x.numel() // size
        out = torch.empty_like(x)
        inverse_rms = torch.empty(num_rows, dtype=torch.float32)
        _kernel("rms_norm_forward", x.dtype)(
            x.data_ptr(),
            weight.data_ptr(),
            num_rows,
            size,
            eps,
            out.data_ptr(),
            inverse_rms.data_ptr(),
            num_threads(),
        )
        ctx.save_for_backward(x, weight, inverse_rms)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse_rms = ctx.saved_tensors
        grad = grads[0].contiguous()
        size = x.shape[-1]
        grad_x = torch.empty_like(x)
        threads = num_threads()
        grad_weight = torch.empty(threads, size, dtype=torch.float32)  # a part of the sum each
        _kernel("rms_norm_backward", x.dtype)(
            x.data_ptr(),
            weight.data_ptr(),
            inverse_rms.data_ptr(),
            grad.data_ptr(),
            inverse_rms.numel(),
            size,
            grad_x.data_ptr(),
            grad_weight.data_ptr(),
            threads,
        )
        return grad_x, grad_weight.sum(0).to(weight.dtype), None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
        swiglu_into(x, out)
        ctx.save_for_backward(x)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        swiglu_gradient_into(x, grads[0].contiguous(), grad_x)
        return grad_x


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, sign=1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        # A rotation's transpose is the rotation back.
        return _rotate(grads[0], cos, sin, sign=-1.0), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, *, sign: float) -> Tensor:
    x = x.contiguous()
    dim = x.shape[-1]
    num_tokens = x.shape[0]
    out = torch.empty_like(x)
    _kernel("rotary", x.dtype)(
        x.data_ptr(),
        cos.contiguous().data_ptr(),
        sin.contiguous().data_ptr(),
        num_tokens,
        x.numel() // max(1, num_tokens * dim),
        dim,
        sign,
        out.data_ptr(),
        num_threads(),
    )
    return out
