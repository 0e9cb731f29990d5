"""Draw one token a row from its logits, by inverse transform sampling, with the token's log-prob."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_tokens(logits: Tensor, temperatures: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw t with probability softmax(logits / temperature)[t]; temperature 0 takes the likeliest token.

    The token is the first whose cumulative probability, in the order of the vocabulary, exceeds the row's uniform:
    equal inputs give equal tokens whatever else is in the batch, and a token of probability 0 is never drawn.
    Logits of -inf (filtered tokens) have probability 0.

    Args:
        logits: [N, V] fp32
        temperatures: [N] fp32, 0 for greedy
        uniforms: [N] fp64 in [0, 1)

    Returns:
        token ids [N] int64, and log softmax(logits / temperature)[id] [N] fp32 (temperature 1 where it is 0)
    """
    return sample_tokens_reference(logits, temperatures, uniforms)


def sample_tokens_reference(logits: Tensor, temperatures: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The specification of `sample_tokens`, in plain PyTorch."""
    greedy = temperatures == 0
    scaled = logits / torch.where(greedy, 1.0, temperatures)[:, None]
    logprobs = torch.log_softmax(scaled, dim=-1)
    # fp32 sums over a large vocabulary lose the tail: a token of probability 1e-8 would share its neighbour's sum.
    cumulative = logprobs.double().exp().cumsum(dim=-1)
    targets = uniforms[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, targets, right=True)[:, 0]
    # Rounding can push a target onto the total: the last token with a probability is then the right one.
    last_possible = (cumulative < cumulative[:, -1:]).sum(dim=-1)
    tokens = torch.where(greedy, logits.argmax(dim=-1), torch.minimum(drawn, last_possible))
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]
