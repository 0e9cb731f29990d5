"""fp32 matrix products on the CPU by our own kernel, which keeps blocks in the caches and tiles in registers.

Every element is one sum, from its first term to its last (a bias or residual that is added in the same pass comes
before them), whatever the number of rows and threads: a row's result does not depend on what else is in the batch.
`python benchmarks/matmul.py` compares it with oneDNN and MKL.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from xrl.kernels.native import native_module
from xrl.kernels.threads import num_threads


def has_matmul(*matrices: Tensor) -> bool:
    """Whether the kernel takes such matrices together: fp32, on a CPU that it has vector instructions for."""
    for matrix in matrices:
        if matrix.dtype != torch.float32 or matrix.device.type != "cpu":
            return False
    return _has_vectors()


@cache
def _has_vectors() -> bool:
    module = native_module()
    return module is not None and module.cpu_isa() != "scalar"


def matmul_into(a: Tensor, b: Tensor, out: Tensor, *, addend: Tensor | None = None) -> None:
    """out = a b + addend; without autograd.

    Args:
        a, b: [M, K] and [K, N] fp32, in any layout
        out: [M, N] fp32, rows contiguous; overlaps neither
        addend: [M, N] as out, and may be out

    Raises:
        ValueError: shapes, types or layouts that do not fit together.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0] or out.shape != (a.shape[0], b.shape[1]):
        raise ValueError(
            f"a [M, K], b [K, N] and out [M, N] are needed, got {list(a.shape)}, {list(b.shape)} and {list(out.shape)}"
        )
    if not (a.dtype == b.dtype == out.dtype == torch.float32 and a.is_cpu and b.is_cpu and out.is_cpu):
        raise ValueError(f"fp32 matrices on the CPU are needed, got {a.dtype}, {b.dtype} and {out.dtype}")
    if addend is not None and (addend.shape, addend.dtype, addend.device) != (out.shape, out.dtype, out.device):
        raise ValueError(f"addend must be as out, {list(out.shape)}, got {addend.dtype} {list(addend.shape)}")
    for name, matrix in (("out", out), ("addend", addend)):
        if matrix is not None and matrix.shape[1] > 1 and matrix.stride(1) != 1:
            raise ValueError(f"the rows of {name} must be contiguous, got strides {list(matrix.stride())}")
    if out.numel() == 0:
        return
    module = native_module()
    if module is None:
        torch.matmul(a, b, out=out) if addend is None else torch.add(addend, a @ b, out=out)
        return
    module.matmul(
        (a.data_ptr(), *a.stride()),
        (b.data_ptr(), *b.stride()),
        (0, 0) if addend is None else (addend.data_ptr(), addend.stride(0)),
        *out.shape,
        a.shape[1],
        out.data_ptr(),
        out.stride(0),
        num_threads(),
    )


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] times b [K, N] -> [M, N], by the kernel where it takes them; without autograd."""
    if not has_matmul(a, b):
        return a @ b
    out = a.new_empty(a.shape[0], b.shape[1])
    matmul_into(a, b, out)
    return out
