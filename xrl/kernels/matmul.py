"""fp32 matrix products on the CPU by our own kernel, which keeps blocks in the caches and tiles in registers.

Every element is one sum, from its first term to its last (a bias or residual that is added in the same pass comes
before them), whatever the number of rows and threads: a row's result does not depend on what else is in the batch.
`python benchmarks/matmul.py` compares it with oneDNN and MKL.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from xrl.kernels.arguments import address, check_apart, check_floats, check_no_gradient, check_tensor
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
    return not why_not_matmul()


def why_not_matmul() -> str:
    """Why the kernel serves no matrices on this machine, in words; empty where it does."""
    module = native_module()
    if module is None:
        return "xrl._C is not built"
    return "this CPU has no vector instructions for it" if module.cpu_isa() == "scalar" else ""


def matmul_into(a: Tensor, b: Tensor, out: Tensor, *, addend: Tensor | None = None) -> None:
    """out = a b + addend; without autograd.

    Args:
        a, b: [M, K] and [K, N] fp32, in any layout
        out: [M, N] fp32, rows contiguous; overlaps neither
        addend: [M, N] as out, and may be out

    Raises:
        ValueError: shapes, types, devices or layouts that do not fit together, or out overlaps what is read.
        TypeError: what should be a tensor is none.
    """
    _check_matrix("a", a)
    _check_matrix("b", b)
    _check_matrix("out", out)
    if addend is not None:
        _check_matrix("addend", addend)
    if a.shape[1] != b.shape[0] or out.shape != (a.shape[0], b.shape[1]):
        raise ValueError(
            f"a [M, K], b [K, N] and out [M, N] are needed, got {list(a.shape)}, {list(b.shape)} and {list(out.shape)}"
        )
    if addend is not None and addend.shape != out.shape:
        raise ValueError(f"addend must be as out, {list(out.shape)}, got {list(addend.shape)}")
    for name, rows in (("out", out), ("addend", addend)):
        if rows is not None and rows.shape[1] > 1 and rows.stride(1) != 1:
            raise ValueError(f"the rows of {name} must be contiguous, got strides {list(rows.stride())}")
    check_no_gradient("matmul_into", a=a, b=b, out=out, addend=addend)
    if out.numel() == 0:
        return
    module = native_module()
    if module is None:
        check_apart({"out": out}, {"a": a, "b": b})
        torch.matmul(a, b, out=out) if addend is None else torch.add(addend, a @ b, out=out)
        return
    module.matmul(
        a=(address(a), *a.stride()),
        b=(address(b), *b.stride()),
        addend=(0, 0) if addend is None else (address(addend), addend.stride(0)),
        rows=out.shape[0],
        columns=out.shape[1],
        depth=a.shape[1],
        c=address(out),
        c_stride=out.stride(0),
        num_threads=num_threads(),
    )


def _check_matrix(name: str, matrix: Tensor) -> None:
    check_floats(name, matrix, (None, None))
    if matrix.dtype != torch.float32 or not matrix.is_cpu:
        raise ValueError(f"{name} must be fp32 on the CPU, got {matrix.dtype} on {matrix.device}")


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] times b [K, N] -> [M, N], by the kernel where it takes them; without autograd."""
    check_floats("a", a, (None, None))
    check_tensor("b", b, (a.shape[1], None), like=a)
    check_no_gradient("matmul", a=a, b=b)
    if not has_matmul(a, b):
        return a @ b
    out = a.new_empty(a.shape[0], b.shape[1])
    matmul_into(a, b, out)
    return out
