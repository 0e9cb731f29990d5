"""RMSNorm of a batch of rows, for inference."""

from __future__ import annotations

import torch
from torch import Tensor

from xrl.kernels.native import native_module
from xrl.kernels.threads import num_threads

_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight (arXiv:1910.07467), accumulated in fp32.

    Args:
        x: [N, H] fp32 or bf16
        weight: [H] of x's dtype

    Raises:
        ValueError: shapes or types that do not fit together.
    """
    if x.ndim != 2 or weight.shape != x.shape[1:] or weight.dtype != x.dtype:
        raise ValueError(
            f"x must be [N, H] and weight [H] of one dtype, "
            f"got {list(x.shape)} {x.dtype} and {list(weight.shape)} {weight.dtype}"
        )
    module = native_module()
    if module is None or x.device.type != "cpu" or x.dtype not in _SUFFIX:
        return rms_norm_reference(x, weight, eps)
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    getattr(module, f"rms_norm_{_SUFFIX[x.dtype]}")(
        x.data_ptr(), weight.data_ptr(), eps, *x.shape, out.data_ptr(), num_threads()
    )
    return out


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The specification of `rms_norm`, in plain PyTorch."""
    x32 = x.float()
    return weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
