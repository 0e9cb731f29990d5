"""Our matrix products against fp64: every layout, edges of tiles, panels and blocks, and each instruction set."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from xrl.kernels.decode.packed_linear import PackedLinear, PackedSwiGLU
from xrl.kernels.matmul import has_matmul, matmul, matmul_into
from xrl.kernels.native import native_module

# Rows, columns, depth: single elements, parts of a tile, more than a block of columns (512) and of depth (384), rows
# that fall into the same lines of L1 (1,024 apart), nothing to add up.
SHAPES = [
    *((1, 1, 1), (7, 33, 5), (130, 257, 33), (13, 512, 1030), (25, 31, 1024), (3, 1100, 700), (20, 40, 0)),
    *((1024, 64, 40), (30, 1024, 50), (20, 2080, 33)),
]


def make_matrix(rows: int, columns: int, *, transposed: bool) -> Tensor:
    return torch.randn(columns, rows).t() if transposed else torch.randn(rows, columns)


def assert_close(found: Tensor, exact: Tensor, depth: int) -> None:
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=3e-6 * max(1, depth) ** 0.5)


@pytest.mark.parametrize("b_transposed", [False, True])
@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize(("rows", "columns", "depth"), SHAPES)
def test_product_and_sum_equal_fp64(
    rows: int, columns: int, depth: int, a_transposed: bool, b_transposed: bool
) -> None:
    torch.manual_seed(0)
    a = make_matrix(rows, depth, transposed=a_transposed)
    b = make_matrix(depth, columns, transposed=b_transposed)
    whole = torch.randn(rows, columns + 3)
    out, behind = whole[:, :columns], whole[:, columns:].clone()
    exact, before = a.double() @ b.double(), out.double()
    matmul_into(a, b, out, addend=out)
    assert_close(out, exact + before, depth)
    matmul_into(a, b, out)
    assert_close(out, exact, depth)
    assert torch.equal(whole[:, columns:], behind)  # what lies between the rows is left alone


def test_addend_of_its_own() -> None:
    torch.manual_seed(0)
    a, b, addend = torch.randn(70, 900), torch.randn(900, 45), torch.randn(70, 50)[:, :45]
    out = torch.empty(70, 45)
    matmul_into(a, b, out, addend=addend)
    assert_close(out, addend.double() + a.double() @ b.double(), 900)
    bias = torch.randn(1, 45).expand(70, 45)
    matmul_into(a, b, out, addend=bias)
    assert_close(out, bias.double() + a.double() @ b.double(), 900)
    with pytest.raises(ValueError, match="addend must be as out"):
        matmul_into(a, b, out, addend=addend[:, 1:])
    with pytest.raises(ValueError, match="rows of addend must be contiguous"):
        matmul_into(a, b, out, addend=torch.randn(45, 70).t())


def test_strides_of_zero_and_steps_are_read_as_they_are() -> None:
    torch.manual_seed(0)
    a = torch.randn(1, 1).expand(30, 50)
    b = torch.randn(100, 80)[::2, ::2]
    assert_close(matmul(a, b), a.double() @ b.double(), 50)


def test_a_row_does_not_depend_on_its_company() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(50, 900), torch.randn(900, 70)
    if not has_matmul(a, b):
        pytest.skip("no vector instructions: torch multiplies")
    whole = matmul(a, b)
    packed = PackedLinear(b.t())
    for row in (0, 11, 12, 49):
        assert torch.equal(matmul(a[row : row + 1], b)[0], whole[row])
        assert torch.equal(packed(a[row : row + 1])[0], whole[row])


@pytest.mark.parametrize("num_threads", [2, 3, 4, 6])
@pytest.mark.parametrize(("rows", "columns"), [(1, 200), (5, 64), (30, 1600), (100, 96), (3, 20), (0, 32), (4, 0)])
def test_any_number_of_threads_gives_the_same(
    rows: int, columns: int, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    a, weight = torch.randn(rows, 400), torch.randn(columns, 400)

    def products() -> list[Tensor]:
        found = [matmul(a, weight.t()), matmul(a, weight.t().contiguous()), matmul(a.t().contiguous().t(), weight.t())]
        if columns:
            found += [PackedLinear(weight)(a), PackedSwiGLU(weight)(a)]
        return found

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone = products()
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    for found, exact in zip(products(), alone, strict=True):
        assert torch.equal(found, exact)


@pytest.mark.parametrize(("rows", "columns", "depth"), [*SHAPES, (0, 8, 4)])
def test_packed_products_equal_fp64(rows: int, columns: int, depth: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, depth), torch.randn(columns, depth), torch.randn(columns)
    other = torch.randn(rows, columns)
    exact = x.double() @ weight.double().t()
    assert_close(PackedLinear(weight)(x), exact, depth)
    assert_close(PackedLinear(weight, bias)(x), exact + bias, depth)
    assert_close(PackedLinear(weight).plus(x, other), exact + other, depth)
    assert_close(PackedLinear(weight, bias).plus(x, other), exact + bias + other, depth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "ffn", "depth"), [(0, 8, 4), (1, 1, 1), (13, 40, 33), (30, 17, 900)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_packed_swiglu_equals_fp64(rows: int, ffn: int, depth: int, dtype: torch.dtype, has_bias: bool) -> None:
    torch.manual_seed(0)
    bias = torch.randn(2 * ffn).to(dtype) if has_bias else torch.zeros(2 * ffn, dtype=dtype)
    x, weight = torch.randn(rows, depth).to(dtype), (torch.randn(2 * ffn, depth) / depth**0.5).to(dtype)
    gate, up = (x.double() @ weight.double().t() + bias.double()).chunk(2, dim=1)
    exact = torch.nn.functional.silu(gate) * up
    found = PackedSwiGLU(weight, bias if has_bias else None)(x)
    assert found.dtype == dtype
    tolerance = 2e-5 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("a", "b", "out", "message"),
    [
        (torch.ones(2, 3), torch.ones(4, 5), torch.ones(2, 5), r"\[2, 3\], \[4, 5\] and \[2, 5\]"),
        (torch.ones(2, 3), torch.ones(3, 5), torch.ones(5, 2), r"\[5, 2\]"),
        (torch.ones(2, 3), torch.ones(3, 5), torch.ones(5, 2).t(), r"contiguous, got strides \[1, 2\]"),
        (torch.ones(2, 3).double(), torch.ones(3, 5), torch.ones(2, 5), "fp32 .* got torch.float64"),
    ],
)
def test_what_does_not_fit_is_refused(a: Tensor, b: Tensor, out: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        matmul_into(a, b, out)


@pytest.mark.parametrize("x", [torch.ones(2, 5), torch.ones(4), torch.ones(2, 4).bfloat16()])
def test_packed_products_refuse_other_shapes_and_types(x: Tensor) -> None:
    if not has_matmul(torch.ones(1)):
        pytest.skip("no vector instructions: torch multiplies, and says so itself")
    for packed in (PackedLinear(torch.ones(3, 4)), PackedSwiGLU(torch.ones(6, 4))):
        with pytest.raises(ValueError, match=r"x must be torch.float32 \[\*, 4\] on cpu, got"):
            packed(x)
    with pytest.raises(ValueError, match=r"other must be torch.float32 \[2, 3\] on cpu, got torch.float32 \[1, 3\]"):
        PackedLinear(torch.ones(3, 4)).plus(torch.ones(2, 4), torch.ones(1, 3))


def test_pages_ahead_are_zeros() -> None:
    module = native_module()
    if module is None:
        pytest.skip("the kernels are not built")
    area = torch.full((3, 10_000), 7, dtype=torch.uint8)
    module.populate_pages([area[0].data_ptr(), area[2].data_ptr()], 10_000, 2)
    assert area[1].eq(7).all()
    assert area[0, 0] == area[2, 4096] == 0


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["scalar", "avx2"])
def test_other_instruction_sets_give_the_same(isa: str) -> None:
    files = [__file__, os.path.join(os.path.dirname(__file__), "layers", "test_gated_mlp.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", *files]
    done = subprocess.run(command, env={**os.environ, "XRL_CPU_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
