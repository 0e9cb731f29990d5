"""Shares of tokens in the loss."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xrl.algorithms.aggregation import token_shares


def test_token_mean_gives_every_token_the_same_share():
    assert token_shares([1, 3, 4], "token-mean") == [1 / 8] * 3


def test_sequence_mean_gives_every_answer_the_same_share():
    assert token_shares([1, 3, 4], "sequence-mean") == pytest.approx([1 / 3, 1 / 9, 1 / 12])


def test_an_empty_answer_has_no_share_and_is_not_counted():
    assert token_shares([2, 0], "token-mean") == [0.5, 0.0]
    assert token_shares([2, 0], "sequence-mean") == [0.5, 0.0]


@pytest.mark.parametrize("kind", ["token-mean", "sequence-mean"])
def test_no_samples_and_no_tokens_are_allowed(kind):
    assert token_shares([], kind) == []
    assert token_shares([0, 0], kind) == [0.0, 0.0]


def test_unknown_aggregation_is_refused():
    with pytest.raises(ValueError, match="token-mean or sequence-mean"):
        token_shares([1], "mean")  # type: ignore[arg-type]


@given(
    lengths=st.lists(st.integers(0, 2000), max_size=50),
    kind=st.sampled_from(["token-mean", "sequence-mean"]),
)
def test_shares_of_all_tokens_sum_to_one(lengths, kind):
    shares = token_shares(lengths, kind)
    total = math.fsum(length * share for length, share in zip(lengths, shares, strict=True))
    assert total == pytest.approx(1.0 if any(lengths) else 0.0)
