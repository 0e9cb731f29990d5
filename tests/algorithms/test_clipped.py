"""The clipped surrogate."""

from __future__ import annotations

import math

import pytest
import torch

from xrl.algorithms.clipped import MAX_LOG_RATIO, clipped_surrogate


def surrogate(ratios, advantages, *, clip_low=0.2, clip_high=0.3, dual_clip=None):
    """The surrogate at given ratios, and the gradient of its sum with respect to the log-probs."""
    logprobs = torch.tensor(ratios, dtype=torch.float64).log().requires_grad_()
    result = clipped_surrogate(
        logprobs,
        torch.zeros_like(logprobs),
        torch.tensor(advantages, dtype=torch.float64),
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
    )
    result.loss.sum().backward()
    return result, logprobs.grad


def close(actual, expected):
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=actual.dtype))


def test_ratio_is_exactly_one_against_its_own_log_probs():
    logprobs = torch.randn(1000).requires_grad_()
    advantages = torch.randn(1000)
    result = clipped_surrogate(logprobs, logprobs.detach(), advantages, clip_low=0.2, clip_high=0.2)
    result.loss.sum().backward()
    assert torch.equal(result.ratio, torch.ones(1000))
    assert torch.equal(result.loss, -advantages)
    assert torch.equal(logprobs.grad, -advantages)  # type: ignore[arg-type]
    assert not (result.clipped_low | result.clipped_high | result.clipped_dual).any()


def test_each_bound_binds_only_where_it_would_help_the_loss():
    ratios, advantages = [0.5, 0.5, 2.0, 2.0], [1.0, -1.0, 1.0, -1.0]
    result, gradient = surrogate(ratios, advantages)
    close(result.loss, [-0.5, 0.8, -1.3, 2.0])
    assert result.clipped_low.tolist() == [False, True, False, False]
    assert result.clipped_high.tolist() == [False, False, True, False]
    close(gradient, [-0.5, 0.0, 0.0, 2.0])


def test_a_token_exactly_on_a_bound_is_not_clipped():
    # 1 - 0.5 and 1 + 1 and their logarithms' exponentials are exact.
    logprobs = torch.tensor([0.5, 2.0, 0.5, 2.0]).log().requires_grad_()
    assert logprobs.exp().tolist() == [0.5, 2.0, 0.5, 2.0]
    advantages = torch.tensor([-1.0, 1.0, 1.0, -1.0])
    result = clipped_surrogate(logprobs, torch.zeros(4), advantages, clip_low=0.5, clip_high=1.0)
    result.loss.sum().backward()
    assert not (result.clipped_low | result.clipped_high).any()
    torch.testing.assert_close(logprobs.grad, -advantages * result.ratio)


@pytest.mark.parametrize(("step", "clipped"), [(-1e-6, False), (1e-6, True)])
def test_bounds_bind_just_past_their_edge(step, clipped):
    result, gradient = surrogate([1.3 + step, 0.8 - step], [1.0, -1.0])
    assert result.clipped_high.tolist() == [clipped, False]
    assert result.clipped_low.tolist() == [False, clipped]
    assert (gradient == 0).tolist() == [clipped, clipped]


def test_dual_clip_bounds_the_loss_of_a_bad_answer_that_became_likelier():
    result, gradient = surrogate([2.9, 3.1, 10.0, 10.0], [-2.0, -2.0, -2.0, 2.0], dual_clip=3.0)
    close(result.loss, [5.8, 6.0, 6.0, -2.6])
    assert result.clipped_dual.tolist() == [False, True, True, False]
    close(gradient, [5.8, 0.0, 0.0, 0.0])


def test_no_advantage_means_no_loss_and_no_clipping():
    result, gradient = surrogate([0.1, 1.0, 10.0], [0.0, 0.0, 0.0], dual_clip=3.0)
    close(result.loss, [0.0, 0.0, 0.0])
    close(gradient, [0.0, 0.0, 0.0])
    assert not (result.clipped_low | result.clipped_high | result.clipped_dual).any()


def test_extreme_log_ratios_stay_finite_in_fp32():
    logprobs = torch.tensor([0.0, 0.0, -1e4, -1e4], requires_grad=True)
    old = torch.tensor([-1e4, -1e4, 0.0, 0.0])
    result = clipped_surrogate(logprobs, old, torch.tensor([1.0, -1.0, 1.0, -1.0]), clip_low=0.2, clip_high=0.2)
    result.loss.sum().backward()
    assert result.loss.isfinite().all()
    assert logprobs.grad is not None
    assert logprobs.grad.isfinite().all()
    assert result.loss[1].item() == pytest.approx(math.exp(MAX_LOG_RATIO), rel=1e-5)


def test_old_log_probs_get_no_gradient():
    old = torch.zeros(3, requires_grad=True)
    logprobs = torch.full((3,), 0.1, requires_grad=True)
    clipped_surrogate(logprobs, old, torch.ones(3), clip_low=0.2, clip_high=0.2).loss.sum().backward()
    assert old.grad is None


def test_gradient_equals_finite_differences():
    torch.manual_seed(0)
    logprobs = torch.randn(64, dtype=torch.float64, requires_grad=True)
    old = torch.randn(64, dtype=torch.float64)
    advantages = torch.randn(64, dtype=torch.float64)

    def loss(x):
        return clipped_surrogate(x, old, advantages, clip_low=0.2, clip_high=0.28, dual_clip=3.0).loss

    assert torch.autograd.gradcheck(loss, (logprobs,))
