"""How much better an answer is than the other answers to the same prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence

# Added to the standard deviation, as in verl: small beside any spread of 0/1 rewards, so advantages keep their unit.
STD_EPS = 1e-6


def has_zero_variance(rewards: Sequence[float]) -> bool:
    """Whether all answers to a prompt got the same reward, so that the group says nothing about what is better."""
    return max(rewards) == min(rewards)


def group_advantages(rewards: Sequence[float], *, normalize: bool) -> list[float]:
    """Compare each answer with the mean of its group.

        A_i = (r_i - mean(r)) / (std(r) + 1e-6)     normalize: GRPO (arXiv:2402.03300)
        A_i =  r_i - mean(r)                        otherwise: Dr. GRPO (arXiv:2503.20783)

    std is the sample standard deviation (divided by G - 1), as in TRL and verl. A group of equal rewards gets
    exact zeros: the rounding error of its mean must not be blown up by a standard deviation of almost 0.

    Args:
        rewards: [G] one reward per answer to the same prompt, G >= 2, finite.
        normalize: divide by the group's standard deviation.

    Returns:
        [G] advantages; they sum to 0 up to rounding.
    """
    num = len(rewards)
    if num < 2:
        raise ValueError(f"a group needs at least 2 rewards to compare, got {num}")
    if has_zero_variance(rewards):
        return [0.0] * num
    mean = math.fsum(rewards) / num
    centred = [reward - mean for reward in rewards]
    if not normalize:
        return centred
    std = math.sqrt(math.fsum(c * c for c in centred) / (num - 1))
    return [c / (std + STD_EPS) for c in centred]
