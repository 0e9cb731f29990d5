"""The element-wise parts of a decoder layer, differentiable: RMSNorm, SwiGLU and rotary embedding, for training.

On the CPU each is one pass over memory, forward and backward, where plain PyTorch takes five to ten. Each public
function stands before its plain PyTorch reference, which serves every other device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from xrl.kernels.arguments import address, check_floats, check_no_gradient, check_number, check_tensor
from xrl.kernels.native import native_module
from xrl.kernels.threads import num_threads

_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv:1910.07467).

    Args:
        x, weight: [..., H] and [H], of one dtype

    Raises (as all operations of this file):
        ValueError: shapes, types or devices that do not fit together.
        TypeError: what should be a tensor is none.
    """
    check_floats("x", x)
    check_tensor("weight", weight, x.shape[-1:], like=x)
    check_number("eps", eps, lowest=0.0)
    if not is_native(x, weight) or x.numel() == 0:
        return reference_rms_norm(x, weight, eps)
    out: Tensor = _RMSNorm.apply(x, weight, eps)
    return out


def reference_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The specification of `rms_norm`."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up (arXiv:2002.05202), with x [..., 2 H] = gate before up -> [..., H]."""
    check_floats("x", x)
    if x.shape[-1] % 2:
        raise ValueError(f"x must be [..., 2 H], gate before up, got {list(x.shape)}")
    if not is_native(x) or x.numel() == 0:
        return reference_swiglu(x)
    out: Tensor = _SwiGLU.apply(x)
    return out


def swiglu_into(x: Tensor, out: Tensor) -> None:
    """`swiglu` of x [..., 2 H] into out [..., H] by the kernel, without autograd; both contiguous."""
    _check_native("x", x)
    *leading, width = x.shape
    _check_dense("out", out, (*leading, width // 2), like=x)
    check_no_gradient("swiglu_into", x=x, out=out)
    if out.numel():
        size = out.shape[-1]
        _kernel("swiglu_forward", x.dtype)(
            x=address(x), num_rows=out.numel() // size, size=size, out=address(out), num_threads=num_threads()
        )


def swiglu_gradient_into(x: Tensor, grad: Tensor, grad_x: Tensor, out: Tensor | None = None) -> None:
    """The gradient of `swiglu` by the kernel; all contiguous.

    Args:
        x, grad: [..., 2 H] and [..., H]
        grad_x: [..., 2 H] result; may be x
        out: [..., H] gets `swiglu(x)` once more; may be grad
    """
    _check_native("x", x)
    *leading, width = x.shape
    _check_dense("grad", grad, (*leading, width // 2), like=x)
    _check_dense("grad_x", grad_x, x.shape, like=x)
    if out is not None:
        _check_dense("out", out, grad.shape, like=x)
    check_no_gradient("swiglu_gradient_into", x=x, grad=grad, grad_x=grad_x, out=out)
    if grad.numel():
        size = grad.shape[-1]
        _kernel("swiglu_backward", x.dtype)(
            x=address(x),
            grad=address(grad),
            num_rows=grad.numel() // size,
            size=size,
            grad_x=address(grad_x),
            out=address(out),
            num_threads=num_threads(),
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
    check_floats("x", x)
    if x.ndim < 2 or x.shape[-1] % 2:
        raise ValueError(f"x must be [T, ..., an even size], got {list(x.shape)}")
    check_tensor("cos", cos, (x.shape[0], x.shape[-1]), like=x)
    check_tensor("sin", sin, cos.shape, like=x)
    check_no_gradient("rotary", cos=cos, sin=sin)
    if not is_native(x, cos, sin) or x.numel() == 0:
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


def _check_native(name: str, x: Tensor) -> None:
    check_floats(name, x)
    if x.shape[-1] % 2 or not is_native(x) or not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous fp32 or bf16 [..., 2 H] on the CPU, got {x.dtype} {list(x.shape)}")


def _check_dense(name: str, tensor: Tensor, shape: Sequence[int], *, like: Tensor) -> None:
    check_tensor(name, tensor, shape, like=like)
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {list(tensor.stride())}")


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
            x=address(x),
            weight=address(weight),
            num_rows=num_rows,
            size=size,
            eps=eps,
            out=address(out),
            inverse_rms=address(inverse_rms),
            num_threads=num_threads(),
        )
        ctx.save_for_backward(x, weight, inverse_rms)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse_rms = ctx.saved_tensors
        grad = grads[0].contiguous()
        size = x.shape[-1]
        grad_x = torch.empty_like(x)
        threads = num_threads()
        grad_weight = torch.empty(threads, size, dtype=torch.float32)  # a part of the sum each
        _kernel("rms_norm_backward", x.dtype)(
            x=address(x),
            weight=address(weight),
            inverse_rms=address(inverse_rms),
            grad=address(grad),
            num_rows=inverse_rms.numel(),
            size=size,
            grad_x=address(grad_x),
            grad_weight=address(grad_weight),
            num_threads=threads,
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
    @once_differentiable
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
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        # A rotation's transpose is the rotation back.
        return _rotate(grads[0], cos, sin, sign=-1.0), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, *, sign: float) -> Tensor:
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()  # which must live until the kernel returns
    dim = x.shape[-1]
    num_tokens = x.shape[0]
    out = torch.empty_like(x)
    _kernel("rotary", x.dtype)(
        x=address(x),
        cosine=address(cos),
        sine=address(sin),
        num_tokens=num_tokens,
        num_heads=x.numel() // max(1, num_tokens * dim),
        dim=dim,
        sign=sign,
        out=address(out),
        num_threads=num_threads(),
    )
    return out
