"""Tokens and their log-probs from logits: temperature, top-k, top-p, and random numbers by position."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xrl.kernels.decode.sample_tokens import sample_tokens

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: splitmix64's step


def splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash 64-bit integers so that neighbours come out unrelated (Steele et al., OOPSLA 2014)."""
    with np.errstate(over="ignore"):  # arithmetic is modulo 2^64
        x = x + _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(seeds: NDArray[np.int64], samples: NDArray[np.int64], positions: NDArray[np.int64]) -> NDArray[np.float64]:
    """One number in [0, 1) for each (request seed, sample's ordinal, token position), whatever else is in the batch.

    A counter-based generator: no state, so a token's draw depends on its position alone.
    """
    bits = splitmix64(seeds.astype(np.uint64))
    bits = splitmix64(bits ^ samples.astype(np.uint64))
    bits = splitmix64(bits ^ positions.astype(np.uint64))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def filter_logits(logits: Tensor, temperatures: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Set every token outside top-k and top-p to -inf.

    top-k keeps the k likeliest tokens; top-p then keeps the fewest likeliest tokens that hold at least the share
    top_p of what is left (arXiv:1904.09751), at the sampling temperature. At least one token stays.

    Args:
        logits: [N, V] fp32
        temperatures: [N] fp32; 0 (greedy) counts as 1, its likeliest token stays in any case
        top_k: [N] int64, 0 keeps every token
        top_p: [N] fp32, 1 keeps every token
    """
    vocab_size = logits.shape[1]
    sorted_logits, order = logits.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocab_size, device=logits.device)
    dropped = rank >= torch.where(top_k > 0, top_k, vocab_size)[:, None]
    scaled = sorted_logits / torch.where(temperatures == 0, 1.0, temperatures)[:, None]
    probabilities = scaled.masked_fill(dropped, -torch.inf).softmax(dim=-1, dtype=torch.float64)
    before = probabilities.cumsum(dim=-1) - probabilities  # mass of the likelier tokens
    dropped |= (before >= top_p[:, None]) & (top_p < 1)[:, None]
    dropped[:, 0] = False
    return logits.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), -torch.inf)


def sample(
    logits: Tensor, temperatures: Tensor, top_k: Tensor, top_p: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw a token a row, each row by its own settings.

    Args:
        logits: [N, V] fp32; changed in place where rows are filtered
        temperatures, top_p: [N] fp32
        top_k: [N] int64
        uniforms: [N] fp64 in [0, 1)

    Returns:
        ids [N] int64 and log-probs [N] fp32 of the distribution drawn from; greedy rows: of the plain softmax
    """
    filtered = ((top_k > 0) | (top_p < 1)) & (temperatures > 0)
    if filtered.any():
        rows = filtered.nonzero()[:, 0]
        logits[rows] = filter_logits(logits[rows], temperatures[rows], top_k[rows], top_p[rows])
    return sample_tokens(logits, temperatures, uniforms)
