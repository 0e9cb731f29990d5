"""The clipped policy-gradient surrogate, token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# log ratios are clamped to +-20 before exp, as in verl: e^20 is finite in fp32 and far outside any clip range. No
# gradient flows through a token beyond it, where a gradient e^20 times too large would drown all others.
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True, kw_only=True)
class ClippedSurrogate:
    """The surrogate and where it was bounded, all [R]."""

    loss: Tensor  # per token, carries the gradient
    ratio: Tensor  # current / old probability, detached
    clipped_low: Tensor  # bool: ratio < 1 - clip_low where that bound binds (negative advantage)
    clipped_high: Tensor  # bool: ratio > 1 + clip_high where that bound binds (positive advantage)
    clipped_dual: Tensor  # bool: held by the dual clip


def clipped_surrogate(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> ClippedSurrogate:
    """PPO's pessimistic surrogate (arXiv:1707.06347), bounds apart (arXiv:2503.14476), dual clip (arXiv:1912.09729).

        ratio = exp(logprobs - old_logprobs)
        l     = max(-A * ratio, -A * clamp(ratio, 1 - clip_low, 1 + clip_high))
        l     = min(l, -A * dual_clip)   where A < 0

    The dual clip bounds the loss of an answer that is worse than its siblings and has become much likelier: without
    it, l grows with the ratio and nothing stops it. A token whose bound binds has no gradient. A token exactly on a
    bound is not clipped.

    Args:
        logprobs: [R] of the model being trained, with gradient.
        old_logprobs: [R] denominator of the ratio; taken as constant.
        advantages: [R] one per token.
        clip_low, clip_high: how far below and above 1 the ratio still counts.
        dual_clip: > 1, or None for no bound where A < 0.
    """
    log_ratio = (logprobs - old_logprobs.detach()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    unbounded = -advantages * ratio
    bounded = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss = torch.maximum(unbounded, bounded)

    detached_ratio = ratio.detach()
    binds = bounded.detach() > unbounded.detach()
    clipped_dual = torch.zeros_like(binds)
    if dual_clip is not None:
        ceiling = -advantages * dual_clip
        clipped_dual = (advantages < 0) & (loss.detach() > ceiling)
        loss = torch.where(clipped_dual, ceiling, loss)
    return ClippedSurrogate(
        loss=loss,
        ratio=detached_ratio,
        clipped_low=binds & (advantages < 0),
        clipped_high=binds & (advantages > 0),
        clipped_dual=clipped_dual,
    )
