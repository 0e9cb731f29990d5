"""RMSNorm of a batch of rows, for inference."""

from __future__ import annotations

import torch
from torch import Tensor

from xrl.kernels.arguments import address, check_floats, check_no_gradient, check_number, check_tensor
from xrl.kernels.native import native_module
from xrl.kernels.threads import num_threads

_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight (arXiv:1910.07467), accumulated in fp32.

    Args:
        x: [N, H] fp32 or bf16
        weight: [H] of x's dtype

    Raises:
        ValueError: shapes, types or devices that do not fit together, or a gradient would be needed.
        TypeError: what should be a tensor is none.
    """
    check_floats("x", x, (None, None))
    check_tensor("weight", weight, x.shape[1:], like=x)
    check_number("eps", eps, lowest=0.0)
    check_no_gradient("rms_norm", x=x, weight=weight)
    module = native_module()
    if module is None or not x.is_cpu or x.dtype not in _SUFFIX:
        return reference_rms_norm(x, weight, eps)
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    getattr(module, f"rms_norm_{_SUFFIX[x.dtype]}")(
        x=address(x),
        weight=address(weight),
        eps=eps,
        num_rows=x.shape[0],
        size=x.shape[1],
        out=address(out),
        num_threads=num_threads(),
    )
    return out


def reference_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The specification of `rms_norm`, in plain PyTorch."""
    x32 = x.float()
    return weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
