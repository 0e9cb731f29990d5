"""What each token counts for in the loss of an update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

LossAggregation = Literal["token-mean", "sequence-mean"]


def token_shares(response_lengths: Sequence[int], kind: LossAggregation) -> list[float]:
    """Share of every token of each sample in the loss, so that loss = sum_t s_t * loss_t.

        token-mean:     s = 1 / sum_j L_j        every token counts the same (DAPO, arXiv:2503.14476)
        sequence-mean:  s = 1 / (n * L_i)        every answer counts the same (GRPO, arXiv:2402.03300)

    The denominator spans the whole update. Shares are therefore worked out once, before samples are cut into
    micro-batches and spread over data-parallel ranks, and plain sums over those give the same loss at any cut.

    Args:
        response_lengths: [n] response tokens of ALL samples of the update, on all ranks. An empty answer has no
            tokens to weigh: its share is 0 and it is not counted in n.

    Returns:
        [n] the share of one token of sample i; sum_i L_i * s_i = 1 (0 where there are no tokens at all).
    """
    if kind == "token-mean":
        num_tokens = sum(response_lengths)
        return [1.0 / num_tokens if length else 0.0 for length in response_lengths]
    if kind == "sequence-mean":
        num_sequences = sum(1 for length in response_lengths if length)
        return [1.0 / (num_sequences * length) if length else 0.0 for length in response_lengths]
    raise ValueError(f"loss aggregation must be token-mean or sequence-mean, got {kind!r}")
