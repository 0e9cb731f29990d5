"""Statistics of softmax(logits / temperature) and the gradient of the logits, in Triton: one program a row.

A row is read in groups of 16 bytes, the widest load there is. Groups begin at multiples of 16 bytes of the address, so
rows of any length, stride and alignment are read equally fast; up to one incomplete group at either end of the row,
its edges, is read column by column. No length, stride or temperature is known at compile time, so none recompiles.

Legend: T groups a program takes at a time, W columns in a group.
"""

# Triton types the arguments of kernels itself, at their first call.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from xrl.kernels.shards import ShardColumns, Softmax

# exp2 of less is 0 in fp32, and 0 times this is 0, where 0 times -inf would be NaN.
LEAST_EXPONENT = tl.constexpr(-200.0)
LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2.0))

GROUP_BYTES = 16
NUM_WARPS = 8
# Of each of the 256 threads, four loads are on their way at a time; two where stores go out as well, whose addresses
# take registers.
STATISTICS_STEP = 1024
GRADIENT_STEP = 512


def statistics(
    logits: Tensor,
    token_ids: Tensor,
    columns: ShardColumns,
    *,
    groups_per_step: int = STATISTICS_STEP,
) -> Tensor:
    """[4, R] fp32: maximum, sum of exp(s), sum of exp(s) * s, and s of the chosen token (0 where not on this shard).

    s = (logit - maximum) * inverse_temperature. The maximum is -inf where no column has a finite logit; then the sums
    are 0, and s of a token on this shard is -inf. A NaN makes the sums of its row NaN.

    Args:
        logits: [R, V] fp32 or bf16, stride(1) == 1.
        token_ids: [R] int64 or int32, contiguous, numbered over the whole vocabulary.
        columns: which of the vocabulary these are; those behind `num_columns` are never read.
        groups_per_step: groups of 16 bytes that a program takes at a time, a power of 2.
    """
    num_rows = logits.shape[0]
    out = torch.empty(4, num_rows, dtype=torch.float32, device=logits.device)
    if num_rows == 0:
        return out
    with torch.cuda.device_of(logits):
        statistics_kernel[(num_rows,)](
            logits,
            token_ids,
            out,
            num_rows,
            columns.num_columns,
            logits.stride(0),
            _phase(logits),
            columns.vocab_start,
            columns.inverse_temperature,
            T=groups_per_step,
            W=GROUP_BYTES // logits.element_size(),
            num_warps=NUM_WARPS,
        )
    return out


def gradient(
    logits: Tensor,
    token_ids: Tensor,
    out: Tensor,
    *,
    columns: ShardColumns,
    softmax: Softmax,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    groups_per_step: int = GRADIENT_STEP,
) -> None:
    """Write the gradient of the logits into `out`, which may be the logits themselves.

        logp_v = min((logit_v - maximum) * inverse_temperature - log_sum, 0),  p_v = exp(logp_v)
        out_v  = (grad_logprob * (1[v is the token] - p_v) - grad_entropy * p_v * (logp_v + entropy)) / temperature

    Rows whose gradients are both 0 get zeros, and their logits are not read. Padded columns get zeros.

    Args:
        logits, token_ids, columns, groups_per_step: as for `statistics`.
        out: [R, V] of the type of the logits, stride(1) == 1.
        softmax: [R] fp32, over the whole vocabulary.
        grad_logprob, grad_entropy: [R] fp32, contiguous; without the second, the entropy has no gradient.
    """
    num_rows = logits.shape[0]
    if out.numel() == 0:
        return
    columns_in_group = GROUP_BYTES // logits.element_size()
    # Stores are as wide as loads where each row of both begins at the same place of a group, as it does in place.
    same_phase = _phase(logits) == _phase(out) and (logits.stride(0) - out.stride(0)) % columns_in_group == 0
    with torch.cuda.device_of(logits):
        gradient_kernel[(num_rows,)](
            logits,
            token_ids,
            out,
            softmax.maximum,
            softmax.log_sum,
            softmax.entropy,
            grad_logprob,
            grad_entropy,
            columns.num_columns,
            out.shape[1],
            logits.stride(0),
            out.stride(0),
            _phase(logits),
            _phase(out),
            columns.vocab_start,
            columns.inverse_temperature,
            SAME_PHASE=same_phase,
            T=groups_per_step,
            W=columns_in_group,
            num_warps=NUM_WARPS,
        )


def _phase(tensor: Tensor) -> int:
    """How many elements after a multiple of 16 bytes a tensor begins."""
    return tensor.data_ptr() % GROUP_BYTES // tensor.element_size()


# Pointers aren't specialised on alignment either: the phase says it all.
@triton.jit(
    do_not_specialize=["num_rows", "num_columns", "stride", "phase", "vocab_start"],
    do_not_specialize_on_alignment=["logits", "token_ids", "out"],
)
def statistics_kernel(
    logits,  # [R, *]
    token_ids,  # [R]
    out,  # [4, R]
    num_rows,
    num_columns,
    stride,  # between rows of the logits
    phase,  # of the logits
    vocab_start,
    inverse_temperature,
    T: tl.constexpr,
    W: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_logits = logits + row * stride
    row_phase = ((phase + row * stride) % W).to(tl.int32)
    # exp2 is one instruction, exp is two: s is kept in units of log 2.
    scale = inverse_temperature * LOG2_E

    # Each group of a step has a maximum and sums of its own: no two threads wait for each other until the row ends.
    maximum = tl.full([T], -float("inf"), tl.float32)
    sum_exp = tl.zeros([T], tl.float32)
    sum_exp_shifted = tl.zeros([T], tl.float32)
    first_group, end_group = _complete_groups(row_phase, num_columns, W)
    for start in range(0, end_group, T):
        group = start + tl.arange(0, T)
        complete = (group >= first_group) & (group < end_group)
        addresses = _addresses(row_logits, row_phase, group, W)
        x = tl.load(addresses, mask=complete[:, None], other=-float("inf")).to(tl.float32)  # [T, W]
        grown = tl.maximum(maximum, tl.max(x, 1))
        # Where all was -inf so far, sums are 0 and stay it.
        growth = tl.where(maximum == -float("inf"), 0.0, (maximum - grown) * scale)
        shifted = _shift(x, tl.where(grown == -float("inf"), 0.0, grown)[:, None], scale)
        exp = tl.exp2(shifted)
        shrink = tl.exp2(growth)
        sum_exp_shifted = _finite_product(shrink, sum_exp_shifted + growth * sum_exp) + tl.sum(exp * shifted, 1)
        sum_exp = sum_exp * shrink + tl.sum(exp, 1)
        maximum = grown

    edge = _edges(row_phase, num_columns, first_group, end_group, W)
    x = tl.load(row_logits + edge, mask=edge >= 0, other=-float("inf")).to(tl.float32)
    row_maximum = tl.maximum(tl.max(maximum, 0), tl.max(x, 0))
    nothing = row_maximum == -float("inf")
    shifted = _shift(x, tl.where(nothing, 0.0, row_maximum), scale)
    exp = tl.exp2(shifted)
    growth = tl.where(maximum == -float("inf"), 0.0, (maximum - row_maximum) * scale)
    shrink = tl.exp2(growth)
    row_sum = tl.sum(sum_exp * shrink, 0) + tl.sum(exp, 0)
    row_sum_shifted = tl.sum(_finite_product(shrink, sum_exp_shifted + growth * sum_exp), 0) + tl.sum(exp * shifted, 0)

    column = tl.load(token_ids + row).to(tl.int64) - vocab_start
    owned = (column >= 0) & (column < num_columns)
    target = tl.load(row_logits + column, mask=owned, other=0.0).to(tl.float32)
    target = tl.where(nothing, -float("inf"), (target - row_maximum) * inverse_temperature)

    out += row
    rows = tl.cast(num_rows, tl.int64)
    tl.store(out, row_maximum)
    tl.store(out + rows, row_sum)
    tl.store(out + 2 * rows, row_sum_shifted * LN_2)
    tl.store(out + 3 * rows, tl.where(owned, target, 0.0))


@triton.jit(
    do_not_specialize=[
        "num_columns",
        "width",
        "stride",
        "out_stride",
        "phase",
        "out_phase",
        "vocab_start",
    ],
    do_not_specialize_on_alignment=[
        "logits",
        "token_ids",
        "out",
        "maximum",
        "log_sum",
        "entropy",
        "grad_logprob",
        "grad_entropy",
    ],
)
def gradient_kernel(
    logits,  # [R, *]
    token_ids,  # [R]
    out,  # [R, width]
    maximum,  # [R], as all below
    log_sum,
    entropy,
    grad_logprob,
    grad_entropy,  # or None
    num_columns,
    width,
    stride,
    out_stride,
    phase,
    out_phase,
    vocab_start,
    inverse_temperature,
    SAME_PHASE: tl.constexpr,
    T: tl.constexpr,
    W: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_logits = logits + row * stride
    row_out = out + row * out_stride
    row_phase = ((phase + row * stride) % W).to(tl.int32)
    out_row_phase = ((out_phase + row * out_stride) % W).to(tl.int32)

    slope = tl.load(grad_logprob + row)
    entropy_slope = 0.0
    if grad_entropy is not None:
        entropy_slope = tl.load(grad_entropy + row)

    if (slope == 0.0) & (entropy_slope == 0.0):
        _fill_zeros(row_out, out_row_phase, width, T, W)
    else:
        row_maximum = tl.load(maximum + row)
        scale = inverse_temperature * LOG2_E
        log2_sum = tl.load(log_sum + row) * LOG2_E
        # out_v = on_target * 1[v is the token] - p_v * (level + tilt * log2 p_v)
        on_target = slope * inverse_temperature
        level = on_target
        tilt = 0.0
        if grad_entropy is not None:
            level += entropy_slope * inverse_temperature * tl.load(entropy + row)
            tilt = entropy_slope * inverse_temperature * LN_2
        # Only a token on this shard is compared with: no column is -1.
        column = tl.load(token_ids + row).to(tl.int64) - vocab_start
        target = tl.where((column >= 0) & (column < num_columns), column, -1).to(tl.int32)

        first_group, end_group = _complete_groups(row_phase, num_columns, W)
        for start in range(0, end_group, T):
            group = start + tl.arange(0, T)
            complete = ((group >= first_group) & (group < end_group))[:, None]
            x = tl.load(_addresses(row_logits, row_phase, group, W), mask=complete, other=0.0).to(tl.float32)
            columns = group[:, None] * W + tl.arange(0, W)[None, :] - row_phase
            wanted = _slopes(
                x, columns == target, row_maximum, scale, log2_sum, on_target, level, tilt, grad_entropy is not None
            )
            wanted = wanted.to(out.dtype.element_ty)
            if SAME_PHASE:
                tl.store(_addresses(row_out, row_phase, group, W), wanted, mask=complete)
            else:
                tl.store(row_out + columns, wanted, mask=complete)

        edge = _edges(row_phase, num_columns, first_group, end_group, W)
        x = tl.load(row_logits + edge, mask=edge >= 0, other=0.0).to(tl.float32)
        # An element outside the edges is -1, as is a target on another shard; neither is stored.
        wanted = _slopes(
            x, edge == target, row_maximum, scale, log2_sum, on_target, level, tilt, grad_entropy is not None
        )
        tl.store(row_out + edge, wanted.to(out.dtype.element_ty), mask=edge >= 0)
        _fill_zeros(row_out + num_columns, (out_row_phase + num_columns) % W, width - num_columns, T, W)


@triton.jit
def _slopes(
    x,
    is_target,
    row_maximum,
    scale,
    log2_sum,
    on_target,
    level,
    tilt,
    WITH_ENTROPY: tl.constexpr,
):
    """The gradient of logits x, see `gradient`. NaN stays NaN."""
    log2_p = (x - row_maximum) * scale - log2_sum
    log2_p = tl.where(log2_p > 0.0, 0.0, log2_p)
    share = tl.zeros_like(x) + level
    if WITH_ENTROPY:
        log2_p = tl.where(log2_p < LEAST_EXPONENT, LEAST_EXPONENT, log2_p)
        share += tilt * log2_p
    return tl.where(is_target, on_target, 0.0) - tl.exp2(log2_p) * share


@triton.jit
def _shift(x, maximum, scale):
    """(x - maximum) * scale, but never so small that 0 * it would not be 0. NaN stays NaN."""
    shifted = (x - maximum) * scale
    return tl.where(shifted < LEAST_EXPONENT, LEAST_EXPONENT, shifted)


@triton.jit
def _finite_product(shrink, value):
    """shrink * value, 0 where shrink is 0 even if the value is infinite."""
    return tl.where(shrink == 0.0, 0.0, shrink * value)


@triton.jit
def _complete_groups(row_phase, num_columns, W: tl.constexpr):
    """First and end of the groups that lie in the row with all their columns. Group 0 holds column -row_phase."""
    first = tl.where(row_phase > 0, 1, 0)
    return first, (row_phase + num_columns) // W


@triton.jit
def _addresses(row, row_phase, group, W: tl.constexpr):
    """Addresses of the columns of groups, [T, W]; `row` is that of column 0."""
    # Tells the compiler what it cannot know, and without which it would load column by column.
    aligned = tl.multiple_of(row - row_phase, 16)
    return aligned + (group[:, None] * W + tl.arange(0, W)[None, :])


@triton.jit
def _edges(row_phase, num_columns, first_group, end_group, W: tl.constexpr):
    """Columns in no complete group, [2 * W]: those before them, then those behind, else -1."""
    element = tl.arange(0, 2 * W)
    before = tl.minimum(first_group * W - row_phase, num_columns)
    behind = tl.maximum(end_group * W - row_phase, before) + element - W
    column = tl.where(element < W, element, behind)
    end = tl.where(element < W, before, num_columns)
    return tl.where(column < end, column, -1)


@triton.jit
def _fill_zeros(row, row_phase, num_columns, T: tl.constexpr, W: tl.constexpr):
    """Zeros into columns [0, num_columns) behind `row`."""
    first_group, end_group = _complete_groups(row_phase, num_columns, W)
    for start in range(0, end_group, T):
        group = start + tl.arange(0, T)
        complete = (group >= first_group) & (group < end_group)
        zeros = tl.zeros([T, W], row.dtype.element_ty)
        tl.store(_addresses(row, row_phase, group, W), zeros, mask=complete[:, None])
    edge = _edges(row_phase, num_columns, first_group, end_group, W)
    tl.store(row + edge, tl.zeros([2 * W], row.dtype.element_ty), mask=edge >= 0)
