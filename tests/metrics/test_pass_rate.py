"""pass@1 and pass@k."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xrl.metrics.pass_rate import pass_at_k, pass_rates, passes


@pytest.mark.parametrize(("reward", "expected"), [(1.0, True), (0.0, False), (-1.0, False), (0.1, False), (0.5, False)])
def test_a_small_bonus_is_not_a_pass(reward, expected):
    assert passes(reward) is expected


@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_pass(case):
    n, c, k = case
    subsets = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(any(subset) for subset in subsets) / len(subsets))


def test_pass_at_k_does_not_overflow_with_many_samples():
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1), (0, 0, 1)])
def test_impossible_counts_are_refused(n, c, k):
    with pytest.raises(ValueError, match="pass"):
        pass_at_k(n, c, k)


def test_rates_are_means_over_prompts():
    rewards = [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]
    assert pass_rates(rewards) == pytest.approx({"pass@1": 1.25 / 3, "pass@4": 2 / 3})
    assert pass_rates(rewards, ks=[2]) == pytest.approx({"pass@2": 1.5 / 3})


def test_one_sample_a_prompt_gives_only_pass_at_1():
    assert pass_rates([[1.0], [0.0]]) == {"pass@1": 0.5}


def test_prompts_with_fewer_samples_than_k_are_left_out_of_pass_at_k():
    assert pass_rates([[1.0, 0.0], [0.0]], ks=[1, 2]) == {"pass@1": 0.25, "pass@2": 1.0}
    assert math.isnan(pass_rates([[1.0]], ks=[2])["pass@2"])


def test_no_prompts_give_no_number():
    assert math.isnan(pass_rates([])["pass@1"])
