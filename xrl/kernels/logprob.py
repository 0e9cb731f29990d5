"""Log-prob of chosen tokens and entropy of their distributions, from vocabulary-parallel logits.

Shapes: R rows, V columns of this rank's shard of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from xrl.kernels.native import native_module

_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


@dataclass(frozen=True, kw_only=True)
class LogprobOutput:
    """All [R], fp32 (fp64 for fp64 logits)."""

    logprob: Tensor  # log softmax(logits / temperature)[token]
    entropy: Tensor  # of softmax(logits / temperature), in nats
    logsumexp: Tensor  # of logits / temperature; carries no gradient


def vocab_parallel_logprob(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
    vocab_start: int = 0,
    num_columns: int | None = None,
) -> LogprobOutput:
    """Log-prob and entropy over the whole vocabulary, of which every rank of `group` holds some columns.

        logprob_r = x_r[token_r] - logsumexp(x_r),  entropy_r = logsumexp(x_r) - sum_v p_rv x_rv,  x = logits / T

    One MAX and one SUM all-reduce of a few floats a row; the backward pass is local. Differentiable in both outputs.

    Args:
        logits: [R, V] fp32 or bf16, rows may be strided.
        token_ids: [R] int64, numbered over the whole vocabulary.
        group: ranks that hold the other columns; None when this rank holds all.
        vocab_start: number of this shard's first column.
        num_columns: columns that count; those behind are padding. Left out: all.

    Raises:
        ValueError: a wrong shape, type, device or temperature, or without a group an id that no column has.
    """
    columns = logits.shape[-1] if num_columns is None else num_columns
    _check(logits, token_ids, temperature, group, vocab_start, columns)
    if _uses_native(logits):
        logprob, entropy, logsumexp = _NativeLogprob.apply(logits, token_ids, temperature, group, vocab_start, columns)
        return LogprobOutput(logprob=logprob, entropy=entropy, logsumexp=logsumexp)
    return reference_logprob(
        logits, token_ids, temperature=temperature, group=group, vocab_start=vocab_start, num_columns=columns
    )


def reference_logprob(
    logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    group: ProcessGroup | None = None,
    vocab_start: int = 0,
    num_columns: int | None = None,
) -> LogprobOutput:
    """The specification of `vocab_parallel_logprob`, in plain PyTorch."""
    x = logits[:, : logits.shape[-1] if num_columns is None else num_columns]
    x = (x if x.dtype == torch.float64 else x.float()) / temperature
    with torch.no_grad():
        # A column of -inf keeps rows finite where a shard holds no column at all.
        floor = torch.full((x.shape[0], 1), float("-inf"), dtype=x.dtype, device=x.device)
        maximum = torch.cat([x.detach(), floor], dim=1).amax(dim=1)
        if group is not None:
            dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
        # Rows without any possible token: anything finite will do, the result is -inf or NaN either way.
        maximum = torch.where(maximum.isneginf(), 0.0, maximum)
    shifted = x - maximum[:, None]
    exp = shifted.exp()
    local = token_ids - vocab_start
    owned = (local >= 0) & (local < x.shape[1])
    if x.shape[1]:
        target = shifted.gather(1, local.clamp(0, x.shape[1] - 1)[:, None])[:, 0].masked_fill(~owned, 0.0)
    else:
        target = x.new_zeros(x.shape[0])
    # A token of probability 0 adds nothing to the entropy; 0 * -inf would be NaN.
    sums = torch.stack([exp.sum(1), (exp * shifted.masked_fill(shifted.isneginf(), 0.0)).sum(1), target])
    if group is not None:
        sums = _SumOverRanks.apply(sums, group)
    sum_exp, sum_exp_shifted, target = sums.unbind()
    log_sum = sum_exp.log()
    return LogprobOutput(
        logprob=target - log_sum,
        entropy=log_sum - sum_exp_shifted / sum_exp,
        logsumexp=(log_sum + maximum).detach(),
    )


class _SumOverRanks(torch.autograd.Function):
    """Sum over a group whose ranks all go on to the same result: the gradient passes through unchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _NativeLogprob(torch.autograd.Function):
    """The compiled kernels: no [R, V] temporary forward, and only the gradient itself backward."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        token_ids: Tensor,
        temperature: float,
        group: ProcessGroup | None,
        vocab_start: int,
        num_columns: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        token_ids = token_ids.contiguous()
        num_rows = logits.shape[0]
        statistics = torch.empty(4, num_rows, dtype=torch.float32)
        maximum, sum_exp, sum_exp_shifted, target = statistics.unbind()
        getattr(native_module(), f"logprob_statistics_{_SUFFIX[logits.dtype]}")(
            logits.data_ptr(),
            num_rows,
            num_columns,
            logits.stride(0),
            token_ids.data_ptr(),
            vocab_start,
            1.0 / temperature,
            maximum.data_ptr(),
            sum_exp.data_ptr(),
            sum_exp_shifted.data_ptr(),
            target.data_ptr(),
            torch.get_num_threads(),
        )
        if group is not None:
            maximum, sum_exp, sum_exp_shifted, target = _combine(statistics, group)
        log_sum = sum_exp.log()
        logsumexp = maximum + log_sum
        entropy = log_sum - sum_exp_shifted / sum_exp
        ctx.save_for_backward(logits, token_ids, logsumexp, entropy)
        ctx.arguments = (temperature, vocab_start, num_columns)
        ctx.mark_non_differentiable(logsumexp)
        return target - logsumexp, entropy, logsumexp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        logits, token_ids, logsumexp, entropy = ctx.saved_tensors
        temperature, vocab_start, num_columns = ctx.arguments
        grad_logprob, grad_entropy = grads[0].float().contiguous(), grads[1].float().contiguous()
        grad_logits = torch.empty(logits.shape, dtype=logits.dtype)
        getattr(native_module(), f"logprob_backward_{_SUFFIX[logits.dtype]}")(
            logits.data_ptr(),
            logits.shape[0],
            num_columns,
            logits.stride(0),
            token_ids.data_ptr(),
            vocab_start,
            1.0 / temperature,
            logsumexp.data_ptr(),
            entropy.data_ptr(),
            grad_logprob.data_ptr(),
            grad_entropy.data_ptr(),
            grad_logits.data_ptr(),
            grad_logits.stride(0),
            logits.shape[1],
            torch.get_num_threads(),
        )
        return grad_logits, None, None, None, None, None


def _combine(statistics: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics of the whole vocabulary from those of every shard."""
    local_maximum, sum_exp, sum_exp_shifted, target = statistics.unbind()
    maximum = local_maximum.clone()
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
    # A shard without possible tokens has maximum -inf and sums 0: it must add 0, not 0 * -inf.
    difference = torch.where(local_maximum.isneginf(), 0.0, local_maximum - maximum)
    scale = difference.exp()
    sums = torch.stack([sum_exp * scale, (sum_exp_shifted + sum_exp * difference) * scale, target])
    dist.all_reduce(sums, group=group)
    sum_exp, sum_exp_shifted, target = sums.unbind()
    return maximum, sum_exp, sum_exp_shifted, target


def _uses_native(logits: Tensor) -> bool:
    return (
        logits.device.type == "cpu"
        and logits.dtype in _SUFFIX
        and (logits.shape[1] == 0 or logits.stride(1) == 1)
        and native_module() is not None
    )


def _check(
    logits: Tensor, token_ids: Tensor, temperature: float, group: ProcessGroup | None, vocab_start: int, columns: int
) -> None:
    if logits.ndim != 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be floating point [R, V], got {logits.dtype} {list(logits.shape)}")
    if token_ids.shape != logits.shape[:1] or token_ids.dtype != torch.int64:
        raise ValueError(
            f"token_ids must be int64 [R] = [{logits.shape[0]}], got {token_ids.dtype} {list(token_ids.shape)}"
        )
    if token_ids.device != logits.device:
        raise ValueError(f"token_ids are on {token_ids.device}, logits on {logits.device}: they must be on one device")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be finite and > 0, got {temperature}")
    if not 0 <= columns <= logits.shape[1] or vocab_start < 0:
        raise ValueError(
            f"num_columns must be in [0, {logits.shape[1]}] and vocab_start >= 0, got {columns} and {vocab_start}"
        )
    # With a group the other ranks may own an id; looking at CUDA values here would wait for the GPU.
    if group is None and logits.device.type == "cpu" and token_ids.numel():
        lowest, highest = int(token_ids.min()), int(token_ids.max())
        if lowest < vocab_start or highest >= vocab_start + columns:
            raise ValueError(
                f"token_ids must be in [{vocab_start}, {vocab_start + columns}), got values from {lowest} to {highest}"
            )
