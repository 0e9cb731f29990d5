"""How many questions are answered rightly: pass@1 and pass@k."""

from __future__ import annotations

import math
from collections.abc import Sequence

# Half-way between wrong (0) and right (1), so that a small bonus for format is not a pass; -1 / 1 rewards fit too.
PASS_REWARD = 0.5


def passes(reward: float) -> bool:
    """Whether an answer with this reward counts as right."""
    return reward > PASS_REWARD


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Chance that at least one of k answers passes, from n drawn of which c passed (unbiased, arXiv:2107.03374).

        pass@k = 1 - C(n - c, k) / C(n, k) = 1 - prod_{i = n-c+1}^{n} (1 - k / i)

    The product stays exact where the binomials would overflow a float.

    Raises:
        ValueError: k is not in [1, n] or c is not in [0, n].
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@k needs 1 <= k <= {num_samples} samples, got k = {k}")
    if not 0 <= num_passed <= num_samples:
        raise ValueError(f"passed samples must be between 0 and {num_samples}, got {num_passed}")
    if num_samples - num_passed < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(num_samples - num_passed + 1, num_samples + 1))


def pass_rates(rewards: Sequence[Sequence[float]], ks: Sequence[int] | None = None) -> dict[str, float]:
    """Mean over prompts of pass@k.

    A prompt with fewer than k samples says nothing about pass@k and is left out of it.

    Args:
        rewards: [prompts][samples]; prompts may have different numbers of samples.
        ks: default: 1 and the smallest number of samples.

    Returns:
        {"pass@1": ..., "pass@4": ...}, in the order of ks; NaN where there are no prompts.
    """
    counts = [(len(row), sum(passes(reward) for reward in row)) for row in rewards]
    if ks is None:
        ks = sorted({1, min((n for n, _ in counts), default=1)})
    return {f"pass@{k}": _mean([pass_at_k(n, c, k) for n, c in counts if n >= k]) for k in ks}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
