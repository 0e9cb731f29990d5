"""The GRPO loss of single tokens and its gradient, in Triton: the maths of `xrl/algorithms`, element by element."""

# Triton types the arguments of kernels itself, at their first call.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

# Log ratios and log weights are clamped to this, see `xrl/algorithms/clipped.py` and `importance.py`.
MAX_LOG_RATIO = tl.constexpr(20.0)
# From here on k3 goes on as its tangent, see `xrl/algorithms/kl.py`.
MAX_LOG_KL = tl.constexpr(10.0)

ROWS_PER_PROGRAM = 256


class RowParams(Protocol):
    """The settings of the loss, as numbers."""

    @property
    def clip_low(self) -> float: ...
    @property
    def clip_high(self) -> float: ...
    @property
    def dual_clip(self) -> float: ...  # 0: off
    @property
    def kl_type(self) -> int: ...  # 0 none, 1 k1, 2 k2, 3 k3
    @property
    def kl_coef(self) -> float: ...
    @property
    def entropy_coef(self) -> float: ...
    @property
    def importance(self) -> int: ...  # 0 off, 1 truncate, 2 mask
    @property
    def importance_bound(self) -> float: ...
    @property
    def importance_from_current(self) -> bool: ...  # the weight's numerator is the current log-prob, not the old one


def grpo_rows(
    *,
    logprob: Tensor,
    entropy: Tensor,
    old: Tensor | None,
    rollout: Tensor | None,
    reference: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    params: RowParams,
) -> Tensor:
    """[10, R] fp32: the loss of each token, its gradient, and where it was bounded.

    Rows of the result: token loss, its gradient by logprob and by entropy (all three times the weight, and 0 where the
    weight is 0, whatever the token holds); ratio, KL, importance weight before its bound; and as 1 or 0: clipped low,
    clipped high, clipped by the dual clip, importance bounded.

    Args:
        logprob, entropy, advantages, weights: [R] fp32, contiguous.
        old: [R], or None for `logprob`: all ratios are 1.
        rollout: [R], or None for no importance weights.
        reference: [R], or None for no KL.
    """
    num_rows = logprob.shape[0]
    out = torch.empty(10, num_rows, dtype=torch.float32, device=logprob.device)
    if num_rows == 0:
        return out
    with torch.cuda.device_of(logprob):
        grpo_rows_kernel[(triton.cdiv(num_rows, ROWS_PER_PROGRAM),)](
            logprob,
            entropy,
            old,
            rollout,
            reference,
            advantages,
            weights,
            out,
            num_rows,
            # Bounds are worked out in fp64 and rounded once, as PyTorch does: a token on a bound must not differ.
            1.0 - params.clip_low,
            1.0 + params.clip_high,
            params.dual_clip,
            params.kl_coef,
            params.entropy_coef,
            1.0 / params.importance_bound,
            params.importance_bound,
            KL_TYPE=0 if reference is None else int(params.kl_type),
            IMPORTANCE=0 if rollout is None else int(params.importance),
            FROM_CURRENT=old is None or bool(params.importance_from_current),
            BLOCK=ROWS_PER_PROGRAM,
            num_warps=4,
        )
    return out


@triton.jit(do_not_specialize=["num_rows"])
def grpo_rows_kernel(
    logprob,  # [R], as all inputs
    entropy,
    old,  # or None, as the next two
    rollout,
    reference,
    advantages,
    weights,
    out,  # [10, R]
    num_rows,
    least_ratio,
    most_ratio,
    dual_clip,  # 0: off
    kl_coef,
    entropy_coef,
    least_importance,
    most_importance,
    KL_TYPE: tl.constexpr,
    IMPORTANCE: tl.constexpr,
    FROM_CURRENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = row < num_rows
    current = tl.load(logprob + row, mask=mask, other=0.0)
    advantage = tl.load(advantages + row, mask=mask, other=0.0)
    weight = tl.load(weights + row, mask=mask, other=0.0)
    denominator = current
    if old is not None:
        denominator = tl.load(old + row, mask=mask, other=0.0)

    log_ratio = current - denominator
    clamped = _clamp(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = tl.exp(clamped)
    unbounded = -advantage * ratio
    bounded = -advantage * _clamp(ratio, least_ratio, most_ratio)
    binds = bounded > unbounded
    loss = tl.where(binds, bounded, unbounded)
    # Nothing flows through a bound that binds, nor through a log ratio beyond its clamp. On a tie of the two arguments
    # the ratio is within the bounds or the advantage is 0: the slope is that of `unbounded` in both cases.
    slope = tl.where(binds | (clamped != log_ratio), 0.0, unbounded)
    ceiling = -advantage * dual_clip
    dual = (dual_clip > 0.0) & (advantage < 0.0) & (loss > ceiling)
    loss = tl.where(dual, ceiling, loss)
    slope = tl.where(dual, 0.0, slope)

    raw = tl.full([BLOCK], 1.0, tl.float32)
    if rollout is not None:
        sampled = tl.load(rollout + row, mask=mask, other=0.0)
        numerator = current if FROM_CURRENT else denominator
        raw = tl.exp(_clamp(numerator - sampled, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    outside = tl.zeros([BLOCK], tl.int1)
    if IMPORTANCE == 1:
        outside = raw > most_importance
        factor = tl.where(outside, most_importance, raw)
        loss *= factor
        slope *= factor
    elif IMPORTANCE == 2:
        outside = (raw > most_importance) | (raw < least_importance)
        factor = tl.where(outside, 0.0, raw)
        loss *= factor
        slope *= factor

    kl = tl.zeros([BLOCK], tl.float32)
    if KL_TYPE != 0:
        difference = current - tl.load(reference + row, mask=mask, other=0.0)
        kl, kl_slope = _kl(difference, KL_TYPE)
        # Chosen, not multiplied by 0: what is off must not bring a NaN in.
        loss += tl.where(kl_coef != 0.0, kl_coef * kl, 0.0)
        slope += tl.where(kl_coef != 0.0, kl_coef * kl_slope, 0.0)
    spread = tl.load(entropy + row, mask=mask, other=0.0)
    loss -= tl.where(entropy_coef != 0.0, entropy_coef * spread, 0.0)

    masked = weight == 0.0
    rows = tl.cast(num_rows, tl.int64)
    out += row
    tl.store(out, tl.where(masked, 0.0, weight * loss), mask=mask)
    tl.store(out + rows, tl.where(masked, 0.0, weight * slope), mask=mask)
    tl.store(out + 2 * rows, tl.where(masked, 0.0, -weight * entropy_coef), mask=mask)
    tl.store(out + 3 * rows, ratio, mask=mask)
    tl.store(out + 4 * rows, kl, mask=mask)
    tl.store(out + 5 * rows, raw, mask=mask)
    tl.store(out + 6 * rows, (binds & (advantage < 0.0)).to(tl.float32), mask=mask)
    tl.store(out + 7 * rows, (binds & (advantage > 0.0)).to(tl.float32), mask=mask)
    tl.store(out + 8 * rows, dual.to(tl.float32), mask=mask)
    tl.store(out + 9 * rows, outside.to(tl.float32), mask=mask)


@triton.jit
def _clamp(x, low, high):
    """x between low and high. Like torch.clamp, this lets NaN pass."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def _kl(difference, KL_TYPE: tl.constexpr):
    """The estimate of a token's KL from logprob - reference, and its derivative by logprob."""
    if KL_TYPE == 1:
        kl = difference
        slope = tl.zeros_like(difference) + 1.0
    elif KL_TYPE == 2:
        kl = 0.5 * difference * difference
        slope = difference
    else:
        log_ratio = -difference
        excess = tl.where(log_ratio > MAX_LOG_KL, log_ratio - MAX_LOG_KL, 0.0)
        capped = log_ratio - excess
        # exp(x) - 1 - x loses all digits near 0, which is where a well-behaved run lives: there, its Taylor series.
        series = 1.0 + capped / 9.0
        series = 1.0 + capped / 8.0 * series
        series = 1.0 + capped / 7.0 * series
        series = 1.0 + capped / 6.0 * series
        series = 1.0 + capped / 5.0 * series
        series = 1.0 + capped / 4.0 * series
        series = 1.0 + capped / 3.0 * series
        is_small = tl.abs(capped) < 0.5
        convex = tl.where(is_small, 0.5 * capped * capped * series, tl.exp(capped) - 1.0 - capped)
        ratio_minus_1 = tl.where(is_small, convex + capped, tl.exp(capped) - 1.0)
        kl = convex + excess * ratio_minus_1
        slope = -ratio_minus_1
    return kl, slope
