"""RMSNorm, SwiGLU and rotary embedding against their references, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from xrl.kernels.layers.layer_ops import (
    reference_rms_norm,
    reference_rotary,
    reference_swiglu,
    rms_norm,
    rotary,
    swiglu,
)

SHAPES = [(0, 8), (1, 2), (7, 1, 64), (33, 3, 96), (5, 2, 130)]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def values(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def compare(
    ours: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: list[Tensor], tolerance: float
) -> None:
    """Outputs and every gradient, against the reference in fp64."""
    mine = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    out, expected = ours(*mine), reference(*exact)
    assert out.dtype == inputs[0].dtype and out.shape == expected.shape
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    upstream = upstream.to(out.dtype)
    out.backward(upstream)
    expected.backward(upstream.double())
    for left, right in zip(mine, exact, strict=True):
        assert left.grad is not None and right.grad is not None
        scale = max(1.0, right.grad.abs().max().item()) if right.grad.numel() else 1.0
        torch.testing.assert_close(left.grad.double(), right.grad, rtol=tolerance, atol=4 * tolerance * scale)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_equals_its_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = [values(*shape, dtype=dtype), 1 + 0.1 * values(shape[-1], dtype=dtype, seed=2)]
    compare(lambda x, w: rms_norm(x, w, 1e-6), lambda x, w: reference_rms_norm(x, w, 1e-6), inputs, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu_equals_its_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    compare(swiglu, reference_swiglu, [3 * values(*shape, dtype=dtype)], TOLERANCE[dtype])


@pytest.mark.parametrize("gate", [-1e4, -90.0, -20.0, 0.0, 20.0, 90.0, 1e4])
def test_swiglu_stays_finite_at_extreme_gates(gate: float) -> None:
    x = torch.tensor([[gate, 1.5]], requires_grad=True)
    swiglu(x).sum().backward()
    exact = torch.tensor([[gate, 1.5]], dtype=torch.float64, requires_grad=True)
    reference_swiglu(exact).sum().backward()
    assert x.grad is not None and exact.grad is not None
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(0, 2, 8), (5, 3, 2), (9, 4, 64), (6, 2, 3, 34)])
def test_rotary_equals_its_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    angles = torch.outer(torch.arange(float(shape[0])), torch.arange(shape[-1] // 2) + 1.0).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    compare(
        lambda x: rotary(x, cos, sin),
        lambda x: reference_rotary(x, cos.double(), sin.double()),
        [values(*shape, dtype=dtype)],
        TOLERANCE[dtype],
    )


def test_strided_inputs_are_read_right() -> None:
    wide = values(6, 20, dtype=torch.float32)
    x = wide[:, 3:13]
    weight = values(10, dtype=torch.float32, seed=3)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), reference_rms_norm(x, weight, 1e-6))
    torch.testing.assert_close(swiglu(x), reference_swiglu(x))
