"""Matrix products with weights that stay put: packed ahead on the CPU, plain tensors elsewhere.

fp32 by our own kernel, bf16 by oneDNN. Both add a residual in the same pass; ours applies SwiGLU as well.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from xrl.kernels.arguments import address, check_floats, check_no_gradient, check_tensor
from xrl.kernels.layers.layer_ops import swiglu
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

    Raises:
        ValueError: shapes, types or devices that do not fit together, or something would need a gradient.
        TypeError: what should be a tensor is none.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        _check_weight(weight, bias)
        self.out_features, self.in_features = weight.shape
        self.bias = None if bias is None else bias.contiguous()
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
        self._check(x)
        if self.own is not None:
            return self._own_product(x, self.bias)
        if self.is_onednn:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """(x W^T + b) + other, with other [N, out_features]"""
        self._check(x)
        check_tensor("other", other, (len(x), self.out_features), like=x)
        check_no_gradient("PackedLinear", other=other)
        if self.own is not None:
            return self._own_product(x, (other if self.bias is None else other + self.bias).contiguous())
        if self.is_onednn:
            return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, "add")
        return F.linear(x, self.weight, self.bias) + other

    def _own_product(self, x: Tensor, addend: Tensor | None) -> Tensor:
        assert self.own is not None
        return _packed_matmul(x, self.own, self.in_features, self.out_features, addend=addend)

    def _check(self, x: Tensor) -> None:
        check_tensor("x", x, (None, self.in_features), like=self.weight)
        check_no_gradient("PackedLinear", x=x)

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

    Raises:
        ValueError, TypeError: as `PackedLinear`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        _check_weight(weight, bias)
        if weight.shape[0] % 2:
            raise ValueError(f"weight must be [2 F, in_features], got {list(weight.shape)}")
        self.out_features, self.in_features = weight.shape[0] // 2, weight.shape[1]
        self.own = _pack(weight, self.out_features, is_gated=True) if bias is None else None
        self.linear = PackedLinear(weight, bias) if self.own is None else None

    def __call__(self, x: Tensor) -> Tensor:
        """x [N, in_features] -> [N, F]"""
        if self.own is not None:
            check_tensor("x", x, (None, self.in_features), like=self.own)
            check_no_gradient("PackedSwiGLU", x=x)
            return _packed_matmul(x, self.own, self.in_features, self.out_features, is_gated=True)
        assert self.linear is not None
        return swiglu(self.linear(x))

    def to(self, device: torch.device) -> PackedSwiGLU:
        """Move in place; packed weights stay where they are."""
        if self.linear is not None:
            self.linear.to(device)
        return self


def _check_weight(weight: Tensor, bias: Tensor | None) -> None:
    check_floats("weight", weight, (None, None))
    if bias is not None:
        check_tensor("bias", bias, weight.shape[:1], like=weight)
    check_no_gradient("a packed product", weight=weight, bias=bias)


def _pack(weight: Tensor, out_features: int, *, is_gated: bool) -> Tensor | None:
    """The weight in our kernel's order, [floats]; None where the kernel does not take it."""
    module = native_module()
    if module is None or not has_matmul(weight) or weight.numel() == 0:
        return None
    in_features = weight.shape[1]
    packed = weight.new_empty(module.packed_size(in_features, out_features, is_gated))
    transposed = weight.t()
    module.pack_weight(
        weight=(address(weight), *transposed.stride()),
        depth=in_features,
        columns=out_features,
        is_gated=is_gated,
        packed=address(packed),
        num_threads=num_threads(),
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
    """x times a packed weight, plus a bias [out_features] or a matrix [N, out_features], contiguous."""
    x = x.contiguous()
    out = x.new_empty(x.shape[0], out_features)
    native_module().packed_matmul(  # type: ignore[union-attr]
        a=address(x),
        a_stride=in_features,
        packed=address(packed),
        depth=in_features,
        columns=out_features,
        is_gated=is_gated,
        addend=(0, 0) if addend is None else (address(addend), 0 if addend.ndim == 1 else addend.stride(0)),
        rows=x.shape[0],
        c=address(out),
        c_stride=out_features,
        num_threads=num_threads(),
    )
    return out


def _onednn_can_pack(weight: Tensor) -> bool:
    """bf16 only, and only on CPUs with instructions for it: others refuse it."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype != torch.bfloat16 or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
