"""Rollout engine and actor give one token slightly different probabilities: measure that, and correct for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from xrl.algorithms.kl import k3

ImportanceCorrection = Literal["off", "truncate", "mask"]

# exp of more than this is beyond any bound in use; it keeps the mean that is reported finite.
MAX_LOG_IMPORTANCE = 20.0


@dataclass(frozen=True, kw_only=True)
class TokenImportance:
    """The correction of each token, all [R], without gradient."""

    factor: Tensor  # of the token's surrogate loss: its importance weight
    raw: Tensor  # actor / rollout probability before the bound
    bounded: Tensor  # bool: capped (truncate) or dropped (mask)


def token_importance(
    actor_logprobs: Tensor, rollout_logprobs: Tensor, *, kind: ImportanceCorrection, bound: float
) -> TokenImportance:
    """Correct, token by token, for sampling from the rollout engine instead of the actor.

        raw = exp(actor - rollout)
        off:       w = 1
        truncate:  w = min(raw, bound)                            as V-trace does (arXiv:1802.01561)
        mask:      w = raw where 1 / bound <= raw <= bound, else 0

    Truncation keeps every token at a small bias; the mask gives up on tokens about which the two disagree.

    Args:
        actor_logprobs: [R] of the actor with the weights that the engine sampled with.
        rollout_logprobs: [R] from the engine.
        kind: `--importance-correction`.
        bound: > 1.
    """
    log_raw = actor_logprobs.detach() - rollout_logprobs.detach()
    raw = log_raw.clamp(-MAX_LOG_IMPORTANCE, MAX_LOG_IMPORTANCE).exp()
    if kind == "off":
        return TokenImportance(factor=torch.ones_like(raw), raw=raw, bounded=torch.zeros_like(raw, dtype=torch.bool))
    if kind == "truncate":
        return TokenImportance(factor=raw.clamp(max=bound), raw=raw, bounded=raw > bound)
    if kind == "mask":
        outside = (raw > bound) | (raw < 1.0 / bound)
        return TokenImportance(factor=raw.masked_fill(outside, 0.0), raw=raw, bounded=outside)
    raise ValueError(f"importance correction must be off, truncate or mask, got {kind!r}")


def mismatch(actor_logprobs: Tensor, rollout_logprobs: Tensor) -> Tensor:
    """|rollout - actor| in nats, [R], without gradient: 0 where engine and actor compute the same model."""
    return (rollout_logprobs.detach() - actor_logprobs.detach()).abs()


def mismatch_kl(actor_logprobs: Tensor, rollout_logprobs: Tensor) -> Tensor:
    """k3 estimate of KL(rollout || actor), [R], without gradient: tokens were drawn from the rollout engine."""
    return k3(rollout_logprobs.detach(), actor_logprobs.detach())
