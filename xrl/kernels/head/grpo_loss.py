"""The GRPO loss of tokens straight from their logits, with the gradient written where the logits were.

Shapes: R rows, V columns of this rank's shard of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from xrl.algorithms.loss_settings import TokenLossSettings
from xrl.algorithms.token_terms import token_terms
from xrl.kernels.head.backend import Backend, BackendName, SinglePassBackend, choose_backend
from xrl.kernels.head.grpo_rows import ROW_OUTPUTS, as_numbers, from_numbers
from xrl.kernels.head.logprob import adjacent, check_found, check_logits, reference_logprob
from xrl.kernels.head.token_inputs import TokenInputs, check_token_inputs
from xrl.kernels.shards import ShardColumns, TokenSoftmax, VocabShard, combine, find_columns, named_group


@dataclass(frozen=True, kw_only=True)
class GrpoLossOutput:
    """All [R], fp32; only `token_loss` carries a gradient. Masked rows hold 0."""

    token_loss: Tensor  # share * loss of the token
    logprob: Tensor
    entropy: Tensor
    ratio: Tensor  # current / old probability
    kl: Tensor  # to the reference; 0 without one
    importance: Tensor  # actor / rollout probability before its bound
    clipped_low: Tensor  # bool, this and the following
    clipped_high: Tensor
    clipped_dual: Tensor
    importance_bounded: Tensor

    @classmethod
    def of(cls, token_loss: Tensor, logprob: Tensor, entropy: Tensor, outputs: Tensor) -> GrpoLossOutput:
        """From what `Backend.grpo_rows` gives, [ROW_OUTPUTS, R]."""
        named = dict(zip(ROW_OUTPUTS, outputs.unbind(), strict=True))
        flags = ("clipped_low", "clipped_high", "clipped_dual", "importance_bounded")
        return cls(
            token_loss=token_loss,
            logprob=logprob,
            entropy=entropy,
            ratio=named["ratio"],
            kl=named["kl"],
            importance=named["importance"],
            **{name: named[name] != 0 for name in flags},
        )


def grpo_token_loss(
    logits: Tensor,
    token_ids: Tensor,
    tokens: TokenInputs,
    settings: TokenLossSettings,
    *,
    temperature: float = 1.0,
    shard: VocabShard | None = None,
    in_place: bool = True,
    upstream: float | None = None,
    backend: BackendName = "auto",
) -> GrpoLossOutput:
    """The loss of `xrl.algorithms.token_terms` for each token, and its gradient, in one go.

        token_loss_r = share_r * (i_r * clipped_r + kl_coef * kl_r - entropy_coef * entropy_r)

    A token's loss depends on its own row alone, so the gradient is known as soon as the row's softmax is: it is formed
    in the forward pass. The backward pass only multiplies rows by the gradient that arrives, and with `upstream` does
    nothing.

    Args:
        logits: [R, V] floating point. Afterwards they HOLD THEIR GRADIENT, if they need one and `in_place` is set:
            fine where nothing else reads them, as with the output of a matrix product.
        token_ids: [R] int64 or int32; ignored where the share is 0.
        tokens: advantages, shares of the loss and the other models' log-probs, each [R].
        settings: clip bounds, KL, entropy and importance weights.
        temperature, shard, backend: as in `vocab_parallel_logprob`.
        in_place: let the gradient take the logits' memory; otherwise, and inside `torch.compile`, it gets its own.
        upstream: the gradient that the backward pass will bring to every token's loss. If given, there is no extra pass
            over the gradient; left out, one multiplies it by what arrives (on the CPU only where that is not 1). Inside
            `torch.compile` the gradient is copied in any case.

    Raises:
        RuntimeError: in the backward pass, if something other than `upstream` arrives.
        ValueError: a wrong shape, type, device, temperature or backend; reference or rollout log-probs that the
            settings need and that are missing; on the CPU an id of an unmasked row that no shard holds.
    """
    check_logits(logits, token_ids, temperature)
    tokens = check_token_inputs(tokens, settings, num_rows=logits.shape[0], device=logits.device)
    columns = find_columns(shard, width=logits.shape[1], device=logits.device, temperature=temperature)
    needs_grad = torch.is_grad_enabled() and logits.requires_grad  # inside a function gradients are off
    if torch.compiler.is_compiling():
        token_loss, logprob, entropy, outputs, _ = torch.ops.xrl.grpo_token_loss(
            logits,
            token_ids,
            tokens.tensors(),
            as_numbers(settings),
            columns.inverse_temperature,
            columns.vocab_start,
            columns.num_columns,
            columns.group_name,
            upstream,
            backend,
            needs_grad,
        )
    else:
        token_loss, logprob, entropy, outputs = _GrpoTokenLoss.apply(
            logits, token_ids, tokens, settings, columns, in_place, upstream, backend, needs_grad
        )
    return GrpoLossOutput.of(token_loss, logprob, entropy, outputs)


def reference_grpo_token_loss(
    logits: Tensor,
    token_ids: Tensor,
    tokens: TokenInputs,
    settings: TokenLossSettings,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """The specification of `grpo_token_loss` on one rank, in plain PyTorch: [R] token losses; every id must be real."""
    out = reference_logprob(logits, token_ids, temperature=temperature)
    old = out.logprob.detach() if tokens.old_logprobs is None else tokens.old_logprobs
    shares = torch.ones_like(tokens.advantages) if tokens.shares is None else tokens.shares
    terms = token_terms(
        logprobs=out.logprob,
        entropy=out.entropy,
        old_logprobs=old,
        rollout_logprobs=old if tokens.rollout_logprobs is None else tokens.rollout_logprobs,
        reference_logprobs=tokens.reference_logprobs,
        advantages=tokens.advantages,
        settings=settings,
    )
    return torch.where(shares == 0, 0.0, shares * terms.loss)


class _GrpoTokenLoss(torch.autograd.Function):
    """(token_loss, logprob, entropy, `Backend.grpo_rows`)"""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        token_ids: Tensor,
        tokens: TokenInputs,
        settings: TokenLossSettings,
        columns: ShardColumns,
        in_place: bool,
        upstream: float | None,
        backend: BackendName,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        compact = adjacent(logits.detach())
        gradient = None
        if needs_grad:
            # A copy made for its layout is ours to overwrite; otherwise the logits are, if the caller says so.
            overwrite = in_place or compact.data_ptr() != logits.data_ptr()
            gradient = compact if overwrite else _like(compact)
        factor = 1.0 if upstream is None else upstream
        logprob, entropy, outputs = _compute(
            compact,
            token_ids,
            gradient,
            columns=columns,
            tokens=tokens,
            settings=settings,
            factor=factor,
            backend=backend,
        )
        if gradient is not None:
            # Not save_for_backward: that would object to logits which were overwritten.
            ctx.gradient = gradient
            ctx.upstream = upstream
        ctx.mark_non_differentiable(logprob, entropy, outputs)
        return outputs[0].clone(), logprob, entropy, outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradient: Tensor | None = ctx.gradient
        if gradient is None:
            raise RuntimeError("the gradient of grpo_token_loss can be taken once: it stood in the logits' memory")
        ctx.gradient = None
        _scale(gradient, grads[0], ctx.upstream)
        return gradient, *(None,) * 8


@torch.library.custom_op("xrl::grpo_token_loss", mutates_args=())
def _loss_op(
    logits: Tensor,
    token_ids: Tensor,
    tokens: Sequence[Tensor | None],
    settings: Sequence[float],
    inverse_temperature: float,
    vocab_start: int,
    num_columns: int,
    group_name: str | None,
    upstream: float | None,
    backend: str,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `_GrpoTokenLoss` computes as one node of a compiled graph, and the gradient: [R, V], empty where not needed.

    Such a graph keeps values, not memory: the gradient gets its own.
    """
    compact = adjacent(logits)
    gradient = _like(compact) if needs_grad else None
    logprob, entropy, outputs = _compute(
        compact,
        token_ids,
        gradient,
        columns=ShardColumns(
            group=named_group(group_name),
            vocab_start=vocab_start,
            num_columns=num_columns,
            inverse_temperature=inverse_temperature,
        ),
        tokens=TokenInputs.of(tokens),
        settings=from_numbers(settings),
        factor=1.0 if upstream is None else upstream,
        backend=backend,  # type: ignore[arg-type]
    )
    # Outputs of an op may not share memory.
    logprob, entropy, outputs = (each.clone() for each in (logprob, entropy, outputs))
    return outputs[0].clone(), logprob, entropy, outputs, logits.new_empty(0, 0) if gradient is None else gradient


@_loss_op.register_fake
def _(logits: Tensor, token_ids: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    needs_grad = others[-1]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    num_rows = token_ids.shape[0]  # not len(), which would make a constant of it
    rows = [logits.new_empty(num_rows, dtype=dtype) for _ in range(3)]
    outputs = logits.new_empty(len(ROW_OUTPUTS), num_rows, dtype=dtype)
    return rows[0], rows[1], rows[2], outputs, _like(logits) if needs_grad else logits.new_empty(0, 0)


@torch.library.custom_op("xrl::scaled_gradient", mutates_args=())
def _scaled_op(gradient: Tensor, arrived: Tensor, upstream: float | None) -> Tensor:
    """The gradient times what arrives a row: an op of its own, as a graph cannot look at values."""
    scaled = gradient.clone()
    _scale(scaled, arrived, upstream)
    return scaled


@_scaled_op.register_fake
def _(gradient: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(gradient)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[4])
    ctx.no_tokens = [None] * len(inputs[2])
    ctx.upstream = inputs[8]
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    (gradient,) = ctx.saved_tensors
    return torch.ops.xrl.scaled_gradient(gradient, grad.contiguous(), ctx.upstream), None, ctx.no_tokens, *(None,) * 8


_loss_op.register_autograd(_backward, setup_context=_save)


def _like(logits: Tensor) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _scale(gradient: Tensor, arrived: Tensor, upstream: float | None) -> None:
    """Multiply rows by what the backward pass brings, unless that was told and is in them already."""
    if upstream is not None:
        require_upstream(arrived, upstream)
    # Asking a CUDA device would wait for it; multiplying by 1 costs less.
    elif arrived.device.type != "cpu" or bool((arrived != 1).any()):
        gradient.mul_(arrived[:, None])


def _compute(
    logits: Tensor,
    token_ids: Tensor,
    gradient: Tensor | None,
    *,
    columns: ShardColumns,
    tokens: TokenInputs,
    settings: TokenLossSettings,
    factor: float,
    backend: BackendName,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `row_outputs` gives; the gradient times `factor` goes to `gradient`, which may be the logits."""
    chosen = choose_backend(backend, device=logits.device, dtype=logits.dtype)
    if columns.group is None and isinstance(chosen, SinglePassBackend):
        _check_ids_before(token_ids, columns, tokens)
        single = chosen.grpo_single_pass(
            logits, token_ids, gradient, columns=columns, tokens=tokens, settings=settings, factor=factor
        )
        if single is not None:
            return single[0], single[1], single[2:]
    softmax = combine(chosen.statistics(logits, token_ids, columns), token_ids, columns)
    logprob, entropy, outputs = row_outputs(chosen, softmax, token_ids, tokens, settings)
    if gradient is not None:
        chosen.gradient(
            logits,
            token_ids,
            gradient,
            columns=columns,
            softmax=softmax,
            grad_logprob=outputs[1] * factor,
            grad_entropy=outputs[2] * factor if settings.entropy_coef else None,
        )
    return logprob, entropy, outputs


def _check_ids_before(token_ids: Tensor, columns: ShardColumns, tokens: TokenInputs) -> None:
    """Refuse ids that no shard holds before anything is overwritten; on the CPU only."""
    if token_ids.device.type == "cpu":
        column = token_ids.long() - columns.vocab_start
        check_found((column >= 0) & (column < columns.num_columns) | (tokens.shares == 0), token_ids)


def require_upstream(arrived: Tensor, expected: float) -> None:
    """Raise RuntimeError if the gradient, which is formed already, was formed for another factor.

    They may be 1e-5 apart: schedules multiply and divide.
    """
    message = f"expected upstream gradient {expected:g}, got another"
    is_expected = ((arrived - expected).abs() <= 1e-5 * abs(expected)).all()
    if arrived.device.type == "cuda":
        torch._assert_async(is_expected, message)  # without waiting for the device
    elif not is_expected:
        raise RuntimeError(message)


def row_outputs(
    backend: Backend, softmax: TokenSoftmax, token_ids: Tensor, tokens: TokenInputs, settings: TokenLossSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-prob [R], entropy [R], `Backend.grpo_rows` [ROW_OUTPUTS, R]), 0 where masked.

    Raises:
        ValueError: no shard holds the token of an unmasked row (seen on the CPU only).
    """
    assert tokens.shares is not None
    masked = tokens.shares == 0
    check_found(softmax.found | masked, token_ids)
    logprob, entropy = softmax.logprob.masked_fill(masked, 0.0), softmax.entropy.masked_fill(masked, 0.0)
    outputs = backend.grpo_rows(logprob, entropy, tokens=tokens, settings=settings)
    return logprob, entropy, outputs.masked_fill(masked, 0.0)
