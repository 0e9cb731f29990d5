"""What each token adds to the GRPO loss: the definition that both the algorithm and the fused kernels evaluate."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from xrl.algorithms.clipped import ClippedSurrogate, clipped_surrogate
from xrl.algorithms.importance import TokenImportance, token_importance
from xrl.algorithms.kl import KL_ESTIMATORS
from xrl.algorithms.loss_settings import TokenLossSettings


@dataclass(frozen=True, kw_only=True)
class TokenTerms:
    """The loss of each token and its terms, all [R]."""

    loss: Tensor  # before token shares; carries the gradient
    surrogate: ClippedSurrogate
    importance: TokenImportance
    actor_logprobs: Tensor  # the importance weights' numerator, detached
    kl: Tensor | None  # to the reference; None without one


def token_terms(
    *,
    logprobs: Tensor,
    entropy: Tensor,
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    reference_logprobs: Tensor | None,
    advantages: Tensor,
    settings: TokenLossSettings,
) -> TokenTerms:
    """Importance-weighted clipped surrogate, KL and entropy terms of each token.

        loss_t = i_t * clipped_t + kl_coef * kl_t - entropy_coef * entropy_t

    Args:
        logprobs, entropy: [R] of the model being trained, with gradient.
        old_logprobs: [R] denominator of the ratio.
        rollout_logprobs: [R] from the engine.
        reference_logprobs: [R] of the frozen starting model, or None where there is none.
        advantages: [R].

    Raises:
        ValueError: the KL is in the loss and there are no reference log-probs.
    """
    surrogate = clipped_surrogate(
        logprobs,
        old_logprobs,
        advantages,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        dual_clip=settings.dual_clip,
    )
    actor_logprobs = (logprobs if settings.importance_from_current else old_logprobs).detach()
    importance = token_importance(
        actor_logprobs, rollout_logprobs, kind=settings.importance_correction, bound=settings.importance_bound
    )
    loss = importance.factor * surrogate.loss
    kl = None
    if reference_logprobs is not None:
        kl = KL_ESTIMATORS[settings.kl_type](logprobs, reference_logprobs.detach())
        # Skipped, not multiplied by 0, here and below: a term that is off must cost no backward pass.
        if settings.kl_coef:
            loss = loss + settings.kl_coef * kl
    elif settings.kl_coef:
        raise ValueError(f"kl_coef is {settings.kl_coef:g}, which needs reference_logprobs, got None")
    if settings.entropy_coef:
        loss = loss - settings.entropy_coef * entropy
    return TokenTerms(loss=loss, surrogate=surrogate, importance=importance, actor_logprobs=actor_logprobs, kl=kl)
