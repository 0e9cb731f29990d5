"""Per-token estimators of KL(p || q) from tokens drawn from p (Schulman, joschu.net/blog/kl-approx.html).

With log r = log q - log p at the sampled token:

    k1 = -log r               unbiased, often negative. As a loss its gradient has mean 0: use it to measure.
    k2 = (log r)^2 / 2        biased, low variance; its gradient is the gradient of the KL.
    k3 = r - 1 - log r        unbiased, never negative, low variance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

# Where r = exp(log r) is continued by its tangent in k3. Two models whose log-probs of one token differ by 10 nats
# are far beyond the range where the estimate means anything, but one such token must not overflow the loss.
MAX_LOG_RATIO = 10.0


def k1(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """-log r, [R] -> [R]."""
    return logprobs - reference_logprobs


def k2(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """(log r)^2 / 2, [R] -> [R]."""
    return 0.5 * (logprobs - reference_logprobs).square()


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """r - 1 - log r, [R] -> [R], never negative.

    Past log r = 10, exp goes on as its tangent, e^10 * (1 + log r - 10). A clamp would be finite too, but it would
    also turn the gradient round: the token that has fallen furthest below the reference would be pushed further down.
    """
    log_ratio = reference_logprobs - logprobs
    excess = (log_ratio - MAX_LOG_RATIO).clamp(min=0.0)
    capped = log_ratio - excess
    # expm1 keeps the digits that exp(x) - 1 loses near x = 0, which is where a well-behaved run lives.
    return (torch.expm1(capped) - capped) + excess * (torch.exp(capped) - 1.0)


KL_ESTIMATORS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType({"k1": k1, "k2": k2, "k3": k3})
"""`--kl-type` -> estimator(logprobs of p, logprobs of q)."""
