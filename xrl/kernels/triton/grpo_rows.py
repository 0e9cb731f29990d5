"""The GRPO loss of single tokens and its gradient, in Triton: the maths of `xrl/algorithms`, element by element."""

# Triton types the arguments of kernels itself, at their first call.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from xrl.kernels.head.grpo_rows import IMPORTANCE_KINDS, KL_TYPES, ROW_OUTPUTS, bounds

if TYPE_CHECKING:
    from xrl.algorithms.loss_settings import TokenLossSettings
    from xrl.kernels.head.token_inputs import TokenInputs

# Log ratios and log weights are clamped to this, see `xrl/algorithms/clipped.py` and `importance.py`.
MAX_LOG_RATIO = tl.constexpr(20.0)
# From here on k3 goes on as its tangent, see `xrl/algorithms/kl.py`.
MAX_LOG_KL = tl.constexpr(10.0)

ROWS_PER_PROGRAM = 256


def grpo_rows(logprob: Tensor, entropy: Tensor, *, tokens: TokenInputs, settings: TokenLossSettings) -> Tensor:
    """[ROW_OUTPUTS, R] fp32: the loss of each token, its gradient, and where it was bounded.

    Rows of the result: token loss, its gradient by logprob and by entropy (all three times the share, and 0 where the
    share is 0, whatever the token holds); ratio, KL, importance weight before its bound; and as 1 or 0: clipped low,
    clipped high, clipped by the dual clip, importance bounded.

    Args:
        logprob, entropy: [R] fp32, contiguous, as all of `tokens` are.
    """
    num_rows = logprob.shape[0]
    old, rollout, reference = tokens.old_logprobs, tokens.rollout_logprobs, tokens.reference_logprobs
    out = torch.empty(len(ROW_OUTPUTS), num_rows, dtype=torch.float32, device=logprob.device)
    if num_rows == 0:
        return out
    # Worked out in fp64 and rounded once, as PyTorch does: a token on a bound must not differ.
    least_ratio, most_ratio, least_importance, most_importance = bounds(settings)
    with torch.cuda.device_of(logprob):
        grpo_rows_kernel[(triton.cdiv(num_rows, ROWS_PER_PROGRAM),)](
            logprob,
            entropy,
            old,
            rollout,
            reference,
            tokens.advantages,
            tokens.shares,
            out,
            num_rows,
            least_ratio,
            most_ratio,
            settings.dual_clip or 0.0,
            settings.kl_coef,
            settings.entropy_coef,
            least_importance,
            most_importance,
            KL_TYPE=0 if reference is None else KL_TYPES.index(settings.kl_type),
            IMPORTANCE=0 if rollout is None else IMPORTANCE_KINDS.index(settings.importance_correction),
            FROM_CURRENT=old is None or settings.importance_from_current,
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
    shares,
    out,  # [ROW_OUTPUTS, R]
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
    share = tl.load(shares + row, mask=mask, other=0.0)
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

    masked = share == 0.0
    rows = tl.cast(num_rows, tl.int64)
    out += row
    tl.store(out, tl.where(masked, 0.0, share * loss), mask=mask)
    tl.store(out + rows, tl.where(masked, 0.0, share * slope), mask=mask)
    tl.store(out + 2 * rows, tl.where(masked, 0.0, -share * entropy_coef), mask=mask)
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
