"""Matrix products with weights that stay put: packed ahead on the CPU, plain tensors elsewhere.

fp32 by our own kernel, bf16 by oneDNN. Both add a residual in the same pass; ours applies SwiGLU as well.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from xrl.kernels.layer_ops import swiglu
from xrl.kernels.matmul import has_matmul
from xrl.kernels.native import native_module
from xrl.kernels.threads import num_threads

_SMALL_BATCHES = (1, 2, 4, 8, 16)


def padded_rows(num_rows: int) -> int:
    """The row count to pad `num_rows` to, so that few distinct ones occur.

    oneDNN compiles a product anew for each row count it meets (milliseconds), so a batch that shrinks row by row
    would compile all the time.
    """
    for size in _SMALL_BATCHES:
        if num_rows <= size:
            return size
    step = 32 if num_rows <= 512 else 128
    return -(-num_rows // step) * step


class PackedLinear:
    """y = x W^T + b, with W packed for the device at construction. For inference: there is no backward.

    Args:
        weight: [out_features, in_features]
        bias: [out_features] or None
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.own = _pack(weight, self.out_features, is_gated=False)
        self.is_onednn = self.own is None and _onednn_can_pack(weight)
        if self.own is not None:
            self.weight = self.own
        elif self.is_onednn:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        else:
            self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        """x [N, in_features] -> [N, out_features]"""
        if self.own is not None:
            return self._own_product(x, self.bias)
        if self.is_onednn:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """(x W^T + b) + other, with other [N, out_features]"""
        if self.own is not None:
            if other.shape != (len(x), self.out_features):
                raise ValueError(f"other must be {[len(x), self.out_features]}, got {list(other.shape)}")
            return self._own_product(x, (other if self.bias is None else other + self.bias).contiguous())
        if self.is_onednn:
            return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, "add")
        return F.linear(x, self.weight, self.bias) + other

    def _own_product(self, x: Tensor, addend: Tensor | None) -> Tensor:
        assert self.own is not None
        return _packed_matmul(x, self.own, self.in_features, self.out_features, addend=addend)

    def to(self, device: torch.device) -> PackedLinear:
        """Move in place; packed weights stay where they are."""
        if self.own is None and not self.is_onednn:
            self.weight = self.weight.to(device)
            self.bias = None if self.bias is None else self.bias.to(device)
        return self


class PackedSwiGLU:
    """swiglu(x W^T + b): the first half of a gated MLP, packed at construction. For inference: there is no backward.

    Args:
        weight: [2 F, in_features] the gate's rows before the up projection's
        bias: [2 F] or None
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.out_features, self.in_features = weight.shape[0] // 2, weight.shape[1]
        self.own = _pack(weight, self.out_features, is_gated=True) if bias is None else None
        self.linear = PackedLinear(weight, bias) if self.own is None else None

    def __call__(self, x: Tensor) -> Tensor:
        """x [N, in_features] -> [N, F]"""
        if self.own is not None:
            return _packed_matmul(x, self.own, self.in_features, self.out_features, is_gated=True)
        assert self.linear is not None
        return swiglu(self.linear(x))

    def to(self, device: torch.device) -> PackedSwiGLU:
        """Move in place; packed weights stay where they are."""
        if self.linear is not None:
            self.linear.to(device)
        return self


def _pack(weight: Tensor, out_features: int, *, is_gated: bool) -> Tensor | None:
    """The weight in our kernel's order, [floats]; None where the kernel does not take it."""
    module = native_module()
    if module is None or not has_matmul(weight) or weight.numel() == 0:
        return None
    in_features = weight.shape[1]
    packed = weight.new_empty(module.packed_size(in_features, out_features, is_gated))
    transposed = weight.t()
    module.pack_weight(
        (weight.data_ptr(), *transposed.stride()),
        in_features,
        out_features,
        is_gated,
        packed.data_ptr(),
        num_threads(),
    )
    return packed


def _packed_matmul(
    x: Tensor,
    packed: Tensor,
    in_features: int,
    out_features: int,
    *,
    addend: Tensor | None = None,
    is_gated: bool = False,
) -> Tensor:
    """x times a packed weight, plus a bias [out_features] or a matrix [N, out_features].

    Raises:
        ValueError: x or the addend is of another shape or type.
    """
    if x.ndim != 2 or x.shape[1] != in_features or x.dtype != torch.float32 or not x.is_cpu:
        raise ValueError(f"x must be fp32 [N, {in_features}] on the CPU, got {x.dtype} {list(x.shape)} on {x.device}")
    if addend is not None and addend.dtype != torch.float32:
        raise ValueError(f"what is added to an fp32 product must be fp32, got {addend.dtype}")
    x = x.contiguous()
    out = x.new_empty(x.shape[0], out_features)
    native_module().packed_matmul(  # type: ignore[union-attr]
        x.data_ptr(),
        in_features,
        packed.data_ptr(),
        in_features,
        out_features,
        is_gated,
        (0, 0) if addend is None else (addend.data_ptr(), 0 if addend.ndim == 1 else addend.stride(0)),
        x.shape[0],
        out.data_ptr(),
        out_features,
        num_threads(),
    )
    return out


def _onednn_can_pack(weight: Tensor) -> bool:
    """bf16 only, and only on CPUs with instructions for it: others refuse it."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype != torch.bfloat16 or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
