"""The primitives of `backend.Backend` in plain PyTorch, on any device and in any floating type."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xrl.algorithms.token_terms import TokenTerms, token_terms
from xrl.config import AlgorithmConfig
from xrl.kernels.head.grpo_rows import IMPORTANCE_KINDS, KL_TYPES

if TYPE_CHECKING:
    from xrl.kernels.head.grpo_rows import GrpoRowParams


def statistics(
    logits: Tensor, token_ids: Tensor, *, inverse_temperature: float, vocab_start: int, num_columns: int
) -> Tensor:
    """See `Backend.statistics`; fp64 for fp64 logits."""
    x = _widen(logits[:, :num_columns])
    # A column of -inf keeps rows finite where a shard holds no column at all.
    maximum = torch.cat([x, x.new_full((x.shape[0], 1), -math.inf)], dim=1).amax(dim=1)
    shifted = (x - maximum[:, None]).masked_fill((maximum == -math.inf)[:, None], -math.inf) * inverse_temperature
    exp = shifted.exp()
    # A token of probability 0 adds nothing; 0 * -inf would be NaN.
    exp_shifted = exp * shifted.masked_fill(shifted == -math.inf, 0.0)
    owned, place = _place(token_ids, vocab_start, num_columns)
    target = x.new_zeros(x.shape[0])
    if num_columns:
        target = torch.where(owned, shifted.gather(1, place[:, None])[:, 0], target)
    return torch.stack([maximum, exp.sum(1), exp_shifted.sum(1), target])


def gradient(
    logits: Tensor,
    token_ids: Tensor,
    out: Tensor,
    *,
    inverse_temperature: float,
    vocab_start: int,
    num_columns: int,
    maximum: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
) -> None:
    """See `Backend.gradient`."""
    x = _widen(logits[:, :num_columns])
    logp = ((x - maximum[:, None]) * inverse_temperature - log_sum[:, None]).clamp(max=0.0)
    p = logp.exp()
    wanted = -grad_logprob[:, None] * p
    if grad_entropy is not None:
        spread = logp.masked_fill(logp == -math.inf, 0.0) + entropy[:, None]
        wanted = wanted - grad_entropy[:, None] * p * spread
    if num_columns:
        owned, place = _place(token_ids, vocab_start, num_columns)
        wanted.scatter_add_(1, place[:, None], (grad_logprob * owned)[:, None])
    idle = grad_logprob == 0
    if grad_entropy is not None:
        idle = idle & (grad_entropy == 0)
    wanted = wanted.masked_fill(idle[:, None], 0.0)
    out[:, :num_columns] = wanted * inverse_temperature
    out[:, num_columns:] = 0.0


def grpo_rows(
    *,
    logprob: Tensor,
    entropy: Tensor,
    old: Tensor | None,
    rollout: Tensor | None,
    reference: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    params: GrpoRowParams,
) -> Tensor:
    """See `Backend.grpo_rows`: `xrl.algorithms.token_terms` and its gradient."""

    def differentiate() -> tuple[TokenTerms, Tensor, Tensor] | None:
        """None where autograd records nothing."""
        with torch.enable_grad(), torch.cuda.stream(stream):
            x, h = logprob.detach().requires_grad_(), entropy.detach().requires_grad_()
            denominator = x.detach() if old is None else old
            terms = token_terms(
                logprobs=x,
                entropy=h,
                old_logprobs=denominator,
                rollout_logprobs=denominator if rollout is None else rollout,
                reference_logprobs=reference if params.kl_type else None,
                advantages=advantages,
                config=_config(params),
            )
            if not terms.loss.requires_grad:
                return None
            on_logprob, on_entropy = torch.autograd.grad(
                terms.loss.sum(), (x, h), allow_unused=True, materialize_grads=True
            )
            return terms, on_logprob, on_entropy

    stream = torch.cuda.current_stream(logprob.device) if logprob.is_cuda else None  # of the device; None changes none
    found = differentiate()
    if found is None:  # as inside an operation of a compiled graph, but for a thread that is not in it
        with ThreadPoolExecutor(max_workers=1) as thread:
            found = thread.submit(differentiate).result()  # Unbounded: it computes, and waits for nobody.
        assert found is not None
    return _outputs(*found, weights, no_rollout=rollout is None)


def _outputs(
    terms: TokenTerms, grad_logprob: Tensor, grad_entropy: Tensor, weights: Tensor, *, no_rollout: bool
) -> Tensor:
    masked = weights == 0

    def weighted(values: Tensor) -> Tensor:
        # Chosen, not multiplied: a masked token may hold anything.
        return (values.detach() * weights).masked_fill(masked, 0.0)

    surrogate, importance = terms.surrogate, terms.importance
    raw = torch.ones_like(weights) if no_rollout else importance.raw
    return torch.stack(
        [
            weighted(terms.loss),
            weighted(grad_logprob),
            weighted(grad_entropy),
            surrogate.ratio,
            torch.zeros_like(weights) if terms.kl is None else terms.kl.detach(),
            raw,
            *(flag.to(weights.dtype) for flag in (surrogate.clipped_low, surrogate.clipped_high)),
            *(flag.to(weights.dtype) for flag in (surrogate.clipped_dual, importance.bounded)),
        ]
    )


def _config(params: GrpoRowParams) -> AlgorithmConfig:
    return AlgorithmConfig(
        clip_low=params.clip_low,
        clip_high=params.clip_high,
        dual_clip=params.dual_clip or None,
        kl_type=KL_TYPES[params.kl_type] if params.kl_type else "k3",  # type: ignore[arg-type]
        kl_coef=params.kl_coef if params.kl_type else 0.0,
        entropy_coef=params.entropy_coef,
        old_logprobs="rollout" if params.importance_from_current else "actor",
        importance_correction=IMPORTANCE_KINDS[params.importance],  # type: ignore[arg-type]
        importance_bound=params.importance_bound,
    )


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _place(token_ids: Tensor, vocab_start: int, num_columns: int) -> tuple[Tensor, Tensor]:
    """Whether each token is on this shard, and its column there (any column where it isn't)."""
    local = token_ids.long() - vocab_start
    owned = (local >= 0) & (local < num_columns)
    return owned, local.clamp(0, max(num_columns - 1, 0))
