"""The training product, by the library chosen for this CPU, against plain PyTorch in fp64."""

from __future__ import annotations

import pytest
import torch

from xrl.kernels.layers.linear import linear


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(0, 4, 3), (1, 1, 1), (7, 64, 96), (130, 33, 257)])
def test_product_and_both_gradients_equal_fp64(rows: int, inputs: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 1, inputs, generator=generator, requires_grad=True)
    weight = torch.randn(outputs, inputs, generator=generator, requires_grad=True)
    upstream = torch.randn(rows, 1, outputs, generator=generator)
    out = linear(x, weight)
    out.backward(upstream)
    exact_x, exact_weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = exact_x @ exact_weight.t()
    expected.backward(upstream.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for found, exact in ((x.grad, exact_x.grad), (weight.grad, exact_weight.grad)):
        assert found is not None and exact is not None
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)


def test_gradient_that_is_not_asked_for_is_not_computed() -> None:
    x = torch.randn(4, 8)
    weight = torch.randn(3, 8, requires_grad=True)
    linear(x, weight).sum().backward()
    assert x.grad is None
    assert weight.grad is not None
