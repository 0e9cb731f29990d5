"""Attention of one new token a row over a paged KV cache in which rows of a group share their prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from xrl.kernels.arguments import (
    address,
    check_floats,
    check_index,
    check_instance,
    check_no_gradient,
    check_range,
    check_tensor,
)
from xrl.kernels.native import native_module
from xrl.kernels.threads import num_threads

_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
_NATIVE_HEAD_DIMS = (16, 32, 64, 128)
_NATIVE_BLOCK_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
_NATIVE_MAX_REPEATS = 32  # query heads that share a KV head


@dataclass(frozen=True, kw_only=True)
class PagedContext:
    """Where the keys and values of a decode batch lie. All tensors are int32, on the cache's device; tables may have
    a longer row stride than they have columns.

    N rows form consecutive groups; a row attends to its group's prompt, then to its own tokens. A block holds
    block_size consecutive tokens.
    """

    group_starts: Tensor  # [num_groups + 1] first row of each group; the last entry is N
    prompt_blocks: Tensor  # [num_groups, max_prompt_blocks] cache blocks of each prompt
    prompt_lengths: Tensor  # [num_groups] tokens
    row_blocks: Tensor  # [N, max_row_blocks] cache blocks of each row's own tokens
    row_lengths: Tensor  # [N] own tokens, the new one included; 0 marks a padding row

    def check(self, num_rows: int, device: torch.device) -> None:
        """Raise ValueError unless the tables fit each other and a batch of so many rows on that device."""
        check_index("prompt_lengths", self.prompt_lengths, (None,), device=device)
        num_groups = len(self.prompt_lengths)
        check_index("group_starts", self.group_starts, (num_groups + 1,), device=device)
        check_index("prompt_blocks", self.prompt_blocks, (num_groups, None), device=device)
        check_index("row_blocks", self.row_blocks, (num_rows, None), device=device)
        check_index("row_lengths", self.row_lengths, (num_rows,), device=device)

    def check_values(self, num_blocks: int, block_size: int) -> None:
        """Raise ValueError if the tables point outside a cache, as csrc/index_checks.h does; on the CPU only."""
        if not self.group_starts.is_cpu:
            return
        starts, num_rows = self.group_starts.tolist(), len(self.row_lengths)
        if starts[0] != 0 or starts[-1] != num_rows or starts != sorted(starts):
            raise ValueError(f"group_starts must go from 0 to {num_rows}, without a step back, got {starts}")
        contexts = (
            ("prompt", self.prompt_blocks, self.prompt_lengths),
            ("row", self.row_blocks, self.row_lengths),
        )
        for name, blocks, lengths in contexts:
            check_range(f"{name}_lengths", lengths, 0, blocks.shape[1] * block_size + 1)
            is_used = torch.arange(blocks.shape[1]) * block_size < lengths[:, None]
            check_range(f"{name}_blocks", blocks[is_used], 0, num_blocks)

    def addresses(self) -> tuple[int, ...]:
        """The tables as the kernels take them: see PagedRowsTuple in csrc/arguments.h."""
        return (
            address(self.group_starts),
            len(self.prompt_lengths),
            address(self.prompt_blocks),
            self.prompt_blocks.stride(0),
            self.prompt_blocks.shape[1],
            address(self.prompt_lengths),
            address(self.row_blocks),
            self.row_blocks.stride(0),
            self.row_blocks.shape[1],
            address(self.row_lengths),
        )


def decode_attention(query: Tensor, key_cache: Tensor, value_cache: Tensor, context: PagedContext) -> Tensor:
    """out[n, h] = softmax(query[n, h] . K / sqrt(D)) V over row n's prompt and own tokens (arXiv:2309.06180).

    Args:
        query: [N, num_heads, D] fp32 or bf16; its rows may be strided (a slice of a fused QKV)
        key_cache, value_cache: [num_blocks, num_kv_heads, block_size, D] with the new tokens in it; what was never
            written must be finite (the reference masks it, but NaN would pass through)

    Returns:
        [N, num_heads, D]; padding rows hold zeros

    Raises:
        ValueError: shapes, types or devices that do not fit together, or (on the CPU) a context that leads out of the
            cache.
        TypeError: what should be a tensor is none.
    """
    _check(query, key_cache, value_cache, context)
    module = native_module()
    repeats = query.shape[1] // key_cache.shape[1]
    num_blocks, num_kv_heads, block_size = key_cache.shape[:3]
    if module is None or not _heads_side_by_side(query) or not fits_native(key_cache, value_cache, repeats=repeats):
        context.check_values(num_blocks, block_size)
        return reference_decode_attention(query, key_cache, value_cache, context)
    num_rows, num_heads, head_dim = query.shape
    out = torch.empty(query.shape, dtype=query.dtype)
    getattr(module, f"decode_attention_{_SUFFIX[query.dtype]}")(
        queries=(address(query), num_rows, query.stride(0), num_heads),
        out=address(out),
        cache=(address(key_cache), address(value_cache), num_blocks, num_kv_heads, block_size, head_dim),
        rows=context.addresses(),
        num_threads=num_threads(),
    )
    return out


def fits_native(key_cache: Tensor, value_cache: Tensor, *, repeats: int) -> bool:
    """Whether the kernel can read such a cache with so many query heads for each KV head."""
    return (
        key_cache.is_cpu
        and key_cache.dtype in _SUFFIX
        and key_cache.shape[3] in _NATIVE_HEAD_DIMS
        and repeats <= _NATIVE_MAX_REPEATS
        and key_cache.shape[2] in _NATIVE_BLOCK_SIZES
        and key_cache.is_contiguous()
        and value_cache.is_contiguous()
    )


def _heads_side_by_side(query: Tensor) -> bool:
    return query.is_cpu and query.stride()[1:] == (query.shape[2], 1)


def _check(query: Tensor, key_cache: Tensor, value_cache: Tensor, context: PagedContext) -> None:
    check_floats("query", query, (None, None, None))
    num_rows, num_heads, head_dim = query.shape
    check_tensor("key_cache", key_cache, (None, None, None, head_dim), like=query)
    check_tensor("value_cache", value_cache, key_cache.shape, like=query)
    num_kv_heads, block_size = key_cache.shape[1:3]
    if num_kv_heads < 1 or block_size < 1 or head_dim < 1:
        raise ValueError(f"key_cache must have a KV head and blocks of a token or more, got {list(key_cache.shape)}")
    if num_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"query must have a multiple of the {num_kv_heads} KV heads, got {list(query.shape)}")
    check_instance("context", context, PagedContext)
    context.check(num_rows, query.device)
    check_no_gradient("decode_attention", query=query, key_cache=key_cache, value_cache=value_cache)


def reference_decode_attention(query: Tensor, key_cache: Tensor, value_cache: Tensor, context: PagedContext) -> Tensor:
    """The specification of `decode_attention`, in plain PyTorch: gathers every row's context side by side."""
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads, block_size = key_cache.shape[1:3]
    starts = context.group_starts.long()
    group = torch.repeat_interleave(
        torch.arange(len(starts) - 1, device=starts.device), starts.diff(), output_size=num_rows
    )
    blocks = torch.cat((context.prompt_blocks[group], context.row_blocks), dim=1).long()
    keys, values = (
        cache[blocks].transpose(2, 3).reshape(num_rows, -1, num_kv_heads, head_dim).transpose(1, 2)
        for cache in (key_cache, value_cache)
    )  # [N, num_kv_heads, blocks * block_size, D]

    def filled(table: Tensor, lengths: Tensor) -> Tensor:
        return torch.arange(table.shape[1] * block_size, device=table.device) < lengths[:, None]

    visible = torch.cat(
        (
            filled(context.prompt_blocks, context.prompt_lengths)[group],
            filled(context.row_blocks, context.row_lengths),
        ),
        dim=1,
    )
    grouped = query.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=visible[:, None, None, :])
    out = out.reshape(num_rows, num_heads, head_dim)
    return out.masked_fill((context.row_lengths == 0)[:, None, None], 0)
