"""Matrix products with weights that stay put: packed once for oneDNN on CPU, plain tensors elsewhere.

PyTorch sends fp32 products to MKL, which packs the weights at every call and leaves AVX-512 unused on CPUs that aren't
Intel's. oneDNN with weights packed ahead is over twice as fast there, and adds a residual in the same pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

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
        self.packed = _onednn_can_pack(weight)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, None) if self.packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        """x [N, in_features] -> [N, out_features]"""
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """(x W^T + b) + other, with other [N, out_features]"""
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, "add")
        return F.linear(x, self.weight, self.bias) + other

    def to(self, device: torch.device) -> PackedLinear:
        """Move in place; packed weights stay where they are."""
        if not self.packed:
            self.weight = self.weight.to(device)
            self.bias = None if self.bias is None else self.bias.to(device)
        return self


def _onednn_can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    if weight.dtype == torch.bfloat16:  # refused on CPUs without instructions for it
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
