"""The gated MLP as one operation against its reference in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xrl.kernels.layers.gated_mlp import gated_mlp, reference_gated_mlp

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}


def inputs(*shape: int, ffn: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = shape[-1]
    sizes = [shape, (2 * ffn, hidden), (hidden, ffn)]
    return [(torch.randn(size, generator=generator) / size[-1] ** 0.5).to(dtype).requires_grad_() for size in sizes]


def exact(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("shape", "ffn"), [((0, 1, 8), 12), ((1, 1, 2), 1), ((7, 2, 64), 96), ((33, 1, 40), 130)])
def test_output_and_gradients_equal_the_reference(shape: tuple[int, ...], ffn: int, dtype: torch.dtype) -> None:
    mine = inputs(*shape, ffn=ffn, dtype=dtype)
    expected_of = exact(mine)
    out, expected = gated_mlp(*mine), reference_gated_mlp(*expected_of)
    assert out.dtype == dtype and out.shape == expected.shape
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    out.backward(upstream)
    expected.backward(upstream.double())
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    for left, right in zip(mine, expected_of, strict=True):
        assert left.grad is not None and right.grad is not None
        scale = max(1.0, right.grad.abs().max().item()) if right.grad.numel() else 1.0
        torch.testing.assert_close(left.grad.double(), right.grad, rtol=tolerance, atol=tolerance * scale)


def test_gradients_that_megatron_keeps_are_added_there() -> None:
    x, gate_up, down = inputs(9, 16, ffn=24, dtype=torch.float32)
    expected_of = exact([x, gate_up, down])
    for weight in (gate_up, down):
        weight.main_grad = torch.ones_like(weight)  # type: ignore[attr-defined]
    gated_mlp(x, gate_up, down).sum().backward()
    reference_gated_mlp(*expected_of).sum().backward()
    for weight, reference in zip((gate_up, down), expected_of[1:], strict=True):
        assert weight.grad is None and reference.grad is not None
        torch.testing.assert_close(weight.main_grad.double(), 1 + reference.grad, rtol=1e-5, atol=1e-5)  # type: ignore[attr-defined]


def test_frozen_weights_get_no_gradient() -> None:
    x, gate_up, down = inputs(5, 8, ffn=6, dtype=torch.float32)
    gated_mlp(x, gate_up.requires_grad_(False), down.requires_grad_(False)).sum().backward()
    assert x.grad is not None and gate_up.grad is None and down.grad is None


def test_a_second_backward_pass_is_refused() -> None:
    out = gated_mlp(*inputs(5, 8, ffn=6, dtype=torch.float32)).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="the backward pass can run once"):
        out.backward()


def test_weights_too_large_to_pack_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for most_packed in (1 << 20, 0):
        monkeypatch.setattr("xrl.kernels.layers.gated_mlp._MOST_PACKED_BYTES", most_packed)
        tensors = inputs(33, 1, 40, ffn=130, dtype=torch.float32)
        out = gated_mlp(*tensors)
        out.backward(torch.ones_like(out))
        results.append([out.detach(), *(tensor.grad for tensor in tensors)])
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("sizes", [((4, 8), (16, 16), (8, 8)), ((4, 8), (16, 8), (8, 16)), ((4, 8), (15, 8), (8, 7))])
def test_shapes_that_do_not_fit_are_refused(sizes: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match=r"(gate_up|down) must be .*, got"):
        gated_mlp(*(torch.ones(size) for size in sizes))
