"""Importance weights between rollout engine and actor."""

from __future__ import annotations

import pytest
import torch

from xrl.algorithms.importance import mismatch, mismatch_kl, token_importance

RAW = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0])  # powers of two: exact in exp and log


def weights(kind, bound=2.5):
    return token_importance(RAW.log(), torch.zeros(5), kind=kind, bound=bound)


def test_off_weighs_every_token_by_one():
    result = weights("off")
    assert torch.equal(result.factor, torch.ones(5))
    torch.testing.assert_close(result.raw, RAW)
    assert not result.bounded.any()


def test_truncate_caps_large_weights_and_keeps_small_ones():
    result = weights("truncate")
    torch.testing.assert_close(result.factor, torch.tensor([0.25, 0.5, 1.0, 2.0, 2.5]))
    assert result.bounded.tolist() == [False, False, False, False, True]


def test_mask_drops_weights_outside_the_bound_and_its_inverse():
    result = weights("mask")
    torch.testing.assert_close(result.factor, torch.tensor([0.0, 0.5, 1.0, 2.0, 0.0]))
    assert result.bounded.tolist() == [True, False, False, False, True]


def test_a_weight_exactly_on_the_bound_is_kept():
    actor = torch.tensor([0.0])
    for kind in ("truncate", "mask"):
        result = token_importance(actor, actor, kind=kind, bound=1.0)
        assert result.factor.tolist() == [1.0]
        assert not result.bounded.any()


def test_weights_carry_no_gradient():
    actor = torch.zeros(3, requires_grad=True)
    assert not token_importance(actor, torch.ones(3), kind="truncate", bound=2.0).factor.requires_grad


@pytest.mark.parametrize("kind", ["off", "truncate", "mask"])
def test_extreme_disagreement_stays_finite(kind):
    result = token_importance(torch.tensor([0.0, -1e4]), torch.tensor([-1e4, 0.0]), kind=kind, bound=2.0)
    assert result.factor.isfinite().all()
    assert result.raw.isfinite().all()


def test_unknown_correction_is_refused():
    with pytest.raises(ValueError, match="off, truncate or mask"):
        token_importance(RAW, RAW, kind="clip", bound=2.0)  # type: ignore[arg-type]


def test_mismatch_is_the_distance_in_nats():
    actor, rollout = torch.tensor([-1.0, -2.0], requires_grad=True), torch.tensor([-1.5, -1.75])
    torch.testing.assert_close(mismatch(actor, rollout), torch.tensor([0.5, 0.25]))
    assert (mismatch_kl(actor, rollout) > 0).all()
    assert torch.equal(mismatch_kl(actor, actor), torch.zeros(2))
    assert not mismatch_kl(actor, rollout).requires_grad
