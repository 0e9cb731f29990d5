"""The primitives of `backend.Backend` in plain PyTorch, on any device and in any floating type."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xrl.algorithms.token_terms import TokenTerms, token_terms

if TYPE_CHECKING:
    from xrl.algorithms.loss_settings import TokenLossSettings
    from xrl.kernels.head.token_inputs import TokenInputs
    from xrl.kernels.shards import ShardColumns, Softmax


def statistics(logits: Tensor, token_ids: Tensor, columns: ShardColumns) -> Tensor:
    """See `Backend.statistics`; fp64 for fp64 logits."""
    x = _widen(logits[:, : columns.num_columns])
    # A column of -inf keeps rows finite where a shard holds no column at all.
    maximum = torch.cat([x, x.new_full((x.shape[0], 1), -math.inf)], dim=1).amax(dim=1)
    shifted = (x - maximum[:, None]).masked_fill(
        (maximum == -math.inf)[:, None], -math.inf
    ) * columns.inverse_temperature
    exp = shifted.exp()
    # A token of probability 0 adds nothing; 0 * -inf would be NaN.
    exp_shifted = exp * shifted.masked_fill(shifted == -math.inf, 0.0)
    owned, column = _column(token_ids, columns)
    target = x.new_zeros(x.shape[0])
    if columns.num_columns:
        target = torch.where(owned, shifted.gather(1, column[:, None])[:, 0], target)
    return torch.stack([maximum, exp.sum(1), exp_shifted.sum(1), target])


def gradient(
    logits: Tensor,
    token_ids: Tensor,
    out: Tensor,
    *,
    columns: ShardColumns,
    softmax: Softmax,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
) -> None:
    """See `Backend.gradient`."""
    num_columns, inverse_temperature = columns.num_columns, columns.inverse_temperature
    x = _widen(logits[:, :num_columns])
    logp = ((x - softmax.maximum[:, None]) * inverse_temperature - softmax.log_sum[:, None]).clamp(max=0.0)
    p = logp.exp()
    wanted = -grad_logprob[:, None] * p
    if grad_entropy is not None:
        spread = logp.masked_fill(logp == -math.inf, 0.0) + softmax.entropy[:, None]
        wanted = wanted - grad_entropy[:, None] * p * spread
    if num_columns:
        owned, column = _column(token_ids, columns)
        wanted.scatter_add_(1, column[:, None], (grad_logprob * owned)[:, None])
    idle = grad_logprob == 0
    if grad_entropy is not None:
        idle = idle & (grad_entropy == 0)
    wanted = wanted.masked_fill(idle[:, None], 0.0)
    out[:, :num_columns] = wanted * inverse_temperature
    out[:, num_columns:] = 0.0


def grpo_rows(logprob: Tensor, entropy: Tensor, *, tokens: TokenInputs, settings: TokenLossSettings) -> Tensor:
    """See `Backend.grpo_rows`: `xrl.algorithms.token_terms` and its gradient."""

    def differentiate() -> tuple[TokenTerms, Tensor, Tensor] | None:
        """None where autograd records nothing."""
        with torch.enable_grad(), torch.cuda.stream(stream):
            x, h = logprob.detach().requires_grad_(), entropy.detach().requires_grad_()
            denominator = x.detach() if tokens.old_logprobs is None else tokens.old_logprobs
            terms = token_terms(
                logprobs=x,
                entropy=h,
                old_logprobs=denominator,
                rollout_logprobs=denominator if tokens.rollout_logprobs is None else tokens.rollout_logprobs,
                reference_logprobs=tokens.reference_logprobs,
                advantages=tokens.advantages,
                settings=settings,
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
    assert tokens.shares is not None
    return _outputs(*found, tokens.shares, no_rollout=tokens.rollout_logprobs is None)


def _outputs(
    terms: TokenTerms, grad_logprob: Tensor, grad_entropy: Tensor, shares: Tensor, *, no_rollout: bool
) -> Tensor:
    masked = shares == 0

    def of_share(values: Tensor) -> Tensor:
        # Chosen, not multiplied: a masked token may hold anything.
        return (values.detach() * shares).masked_fill(masked, 0.0)

    surrogate, importance = terms.surrogate, terms.importance
    raw = torch.ones_like(shares) if no_rollout else importance.raw
    return torch.stack(
        [
            of_share(terms.loss),
            of_share(grad_logprob),
            of_share(grad_entropy),
            surrogate.ratio,
            torch.zeros_like(shares) if terms.kl is None else terms.kl.detach(),
            raw,
            *(flag.to(shares.dtype) for flag in (surrogate.clipped_low, surrogate.clipped_high)),
            *(flag.to(shares.dtype) for flag in (surrogate.clipped_dual, importance.bounded)),
        ]
    )


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _column(token_ids: Tensor, columns: ShardColumns) -> tuple[Tensor, Tensor]:
    """Whether each token is on this shard, and its column there (any column where it isn't)."""
    local = token_ids.long() - columns.vocab_start
    owned = (local >= 0) & (local < columns.num_columns)
    return owned, local.clamp(0, max(columns.num_columns - 1, 0))
