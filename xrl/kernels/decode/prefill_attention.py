"""Causal attention of prompts, laid end to end, over themselves: what a prefill needs.

Shapes: N tokens; n query heads and g key/value heads of size D.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from xrl.kernels.arguments import address, check_count, check_floats, check_instance, check_no_gradient
from xrl.kernels.layers.self_attention import can_run
from xrl.kernels.native import native_module
from xrl.kernels.threads import num_threads

_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


def prefill_attention(qkv: Tensor, lengths: Sequence[int], *, num_heads: int) -> Tensor:
    """Each prompt's queries over its own keys up to theirs.

    Args:
        qkv: [N, n + 2 g, D] query, key and value heads of each token, contiguous; sum(lengths) <= N.
        lengths: tokens of each prompt, at least 1.

    Returns:
        [N, n, D]; zeros behind the last prompt

    Raises:
        ValueError: qkv is not as said, or the prompts have more tokens than it.
        TypeError: qkv is no tensor, or lengths are no whole numbers.
    """
    _check(qkv, lengths, num_heads)
    if not lengths or not can_run(dtype=qkv.dtype, device=qkv.device, head_dim=qkv.shape[2]):
        return reference_prefill_attention(qkv, lengths, num_heads=num_heads)
    starts = [*accumulate(lengths, initial=0)][:-1]
    sequences = torch.tensor([starts, list(lengths), [-1] * len(lengths)], dtype=torch.int32)  # they continue none
    num_tokens, dim = sum(lengths), qkv.shape[2]
    out = qkv.new_empty(len(qkv), num_heads, dim)
    log_sums = torch.empty(num_heads, num_tokens)  # for a backward pass, which there is none of
    getattr(native_module(), f"prefill_attention_{_SUFFIX[qkv.dtype]}")(
        qkv=address(qkv),
        shape=(num_heads, (qkv.shape[1] - num_heads) // 2, dim, num_tokens, dim**-0.5),
        sequences=(*(address(row) for row in sequences), len(lengths), 1),
        out=address(out),
        log_sums=address(log_sums),
        num_threads=num_threads(),
    )
    out[num_tokens:] = 0
    return out


def reference_prefill_attention(qkv: Tensor, lengths: Sequence[int], *, num_heads: int) -> Tensor:
    """The specification of `prefill_attention`; on CUDA what runs."""
    groups = (qkv.shape[1] - num_heads) // 2
    out = qkv.new_zeros(qkv.shape[0], num_heads, qkv.shape[2])
    start = 0
    for length in lengths:
        prompt = qkv[start : start + length].transpose(0, 1).unsqueeze(0)  # [1, heads, length, D]
        query, key, value = prompt.split([num_heads, groups, groups], dim=1)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        out[start : start + length] = attended[0].transpose(0, 1)
        start += length
    return out


def _check(qkv: Tensor, lengths: Sequence[int], num_heads: int) -> None:
    check_floats("qkv", qkv, (None, None, None))
    if not qkv.is_contiguous():
        raise ValueError(f"qkv must be [N, n + 2 g, D] and contiguous, got strides {list(qkv.stride())}")
    check_count("num_heads", num_heads)
    num_others = qkv.shape[1] - num_heads
    if num_others < 2 or num_others % 2 or num_heads % (num_others // 2) or qkv.shape[2] < 1:
        raise ValueError(
            f"qkv needs {num_heads} query heads and 2 g others, where g divides them, got {list(qkv.shape)}"
        )
    check_instance("lengths", lengths, Sequence)
    for length in lengths:
        check_count("lengths", length)
    if sum(lengths) > len(qkv):
        raise ValueError(f"lengths {list(lengths)} are more tokens than the {len(qkv)} of qkv")
    check_no_gradient("prefill_attention", qkv=qkv)
