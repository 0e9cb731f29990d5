"""Group-relative advantages."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xrl.algorithms.advantages import STD_EPS, group_advantages, has_zero_variance

rewards_of_a_group = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=32)


def test_normalized_advantages_match_values_worked_out_by_hand():
    # mean 0.25, centred (0.75, -0.25, -0.25, -0.25), sample variance 0.75 / 3 = 0.25
    expected = [1.5, -0.5, -0.5, -0.5]
    assert group_advantages([1, 0, 0, 0], normalize=True) == pytest.approx(expected, rel=1e-5)


def test_unnormalized_advantages_are_the_centred_rewards():
    assert group_advantages([1, 0, 0, 0], normalize=False) == [0.75, -0.25, -0.25, -0.25]


def test_standard_deviation_is_the_samples_own():
    rewards = [0.1, 0.9, 0.4]
    scale = statistics.stdev(rewards) + STD_EPS
    expected = [(reward - statistics.mean(rewards)) / scale for reward in rewards]
    assert group_advantages(rewards, normalize=True) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
def test_equal_rewards_give_exact_zeros(normalize):
    # The rounded mean of 0.1 is not 0.1 for every count.
    for num in range(2, 40):
        assert group_advantages([0.1] * num, normalize=normalize) == [0.0] * num


def test_one_answer_is_no_group():
    with pytest.raises(ValueError, match="at least 2 rewards"):
        group_advantages([1.0], normalize=True)


def test_zero_variance_is_equality_of_all_rewards():
    assert has_zero_variance([0.3, 0.3])
    assert not has_zero_variance([0.3, 0.3, 0.30000001])


@given(rewards=rewards_of_a_group, normalize=st.booleans())
def test_advantages_are_finite_and_sum_to_zero(rewards, normalize):
    advantages = group_advantages(rewards, normalize=normalize)
    assert all(math.isfinite(advantage) for advantage in advantages)
    # Rounding of the mean, seen through the division by a standard deviation that may be as small as the eps.
    unit = max(abs(reward) for reward in rewards) * 2.0**-52 / (STD_EPS if normalize else 1.0)
    assert abs(math.fsum(advantages)) <= len(rewards) * unit + 1e-12


@given(rewards=rewards_of_a_group, normalize=st.booleans())
def test_advantages_keep_the_order_of_rewards(rewards, normalize):
    advantages = group_advantages(rewards, normalize=normalize)
    ranked = [advantage for _, advantage in sorted(zip(rewards, advantages, strict=True))]
    assert ranked == sorted(ranked)


@given(wins=st.lists(st.integers(0, 1), min_size=2, max_size=16), shift=st.integers(-50, 50))
def test_a_constant_added_to_all_rewards_changes_nothing(wins, shift):
    shifted = [win + shift for win in wins]
    assert group_advantages(shifted, normalize=True) == pytest.approx(group_advantages(wins, normalize=True), abs=1e-9)
