"""KL estimators."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xrl.algorithms.kl import KL_ESTIMATORS, MAX_LOG_RATIO, k1, k2, k3

log_ratios = st.lists(st.floats(-200, 200, width=32), min_size=1, max_size=64)


def test_estimators_match_values_worked_out_by_hand():
    logprobs, reference = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])  # log r = -0.5, 1
    torch.testing.assert_close(k1(logprobs, reference), torch.tensor([0.5, -1.0]))
    torch.testing.assert_close(k2(logprobs, reference), torch.tensor([0.125, 0.5]))
    torch.testing.assert_close(k3(logprobs, reference), torch.tensor([math.exp(-0.5) - 0.5, math.e - 2]))


@pytest.mark.parametrize("name", sorted(KL_ESTIMATORS))
def test_equal_models_have_no_divergence(name):
    logprobs = torch.linspace(-30, 0, 100)
    assert torch.equal(KL_ESTIMATORS[name](logprobs, logprobs.clone()), torch.zeros(100))


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_unbiased_estimators_average_to_the_divergence(name):
    """The mean over the whole vocabulary, weighted by p, is the exact KL: no sampling in the test."""
    torch.manual_seed(0)
    p = torch.randn(50, dtype=torch.float64).log_softmax(-1)
    q = torch.randn(50, dtype=torch.float64).log_softmax(-1)
    exact = (p.exp() * (p - q)).sum()
    torch.testing.assert_close((p.exp() * KL_ESTIMATORS[name](p, q)).sum(), exact)


@given(log_ratios)
def test_k3_is_never_negative(values):
    reference = torch.tensor(values)
    assert (k3(torch.zeros_like(reference), reference) >= 0).all()


def test_k3_is_accurate_where_models_almost_agree():
    log_ratio = torch.tensor([1e-3, -1e-3, 1e-2], dtype=torch.float32)
    exact = log_ratio.double().square() / 2 + log_ratio.double() ** 3 / 6 + log_ratio.double() ** 4 / 24
    torch.testing.assert_close(k3(torch.zeros(3), log_ratio).double(), exact, rtol=2e-4, atol=0)


@pytest.mark.parametrize("name", sorted(KL_ESTIMATORS))
def test_extreme_log_ratios_stay_finite_forward_and_backward(name):
    logprobs = torch.tensor([-1e4, -100.0, -1e-7, 0.0], requires_grad=True)
    reference = torch.tensor([0.0, -1e-7, -100.0, -1e4])
    values = KL_ESTIMATORS[name](logprobs, reference)
    values.sum().backward()
    assert values.isfinite().all()
    assert logprobs.grad is not None
    assert logprobs.grad.isfinite().all()


def test_k3_is_continued_by_its_tangent():
    bound = torch.tensor([MAX_LOG_RATIO], dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    plain = torch.expm1(bound) - bound
    torch.testing.assert_close(k3(zero, bound), plain)
    torch.testing.assert_close(k3(zero, bound + 2), plain + 2 * torch.expm1(bound))


def test_k3_pulls_a_token_back_however_far_it_has_fallen_below_the_reference():
    logprobs = torch.tensor([-5.0, -15.0, -50.0], requires_grad=True)
    k3(logprobs, torch.zeros(3)).sum().backward()
    assert logprobs.grad is not None
    assert (logprobs.grad < 0).all()  # descent raises the log-prob


@pytest.mark.parametrize("name", sorted(KL_ESTIMATORS))
def test_gradient_equals_finite_differences(name):
    torch.manual_seed(0)
    logprobs = (torch.randn(20, dtype=torch.float64) - 2).requires_grad_()
    reference = torch.randn(20, dtype=torch.float64) - 2
    assert torch.autograd.gradcheck(lambda x: KL_ESTIMATORS[name](x, reference), (logprobs,))
