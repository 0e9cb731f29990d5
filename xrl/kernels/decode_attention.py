"""Attention of one new token a row over a paged KV cache in which rows of a group share their prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

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

    def check(self, num_rows: int) -> None:
        """Raises ValueError where the tables do not fit together, or a batch of so many rows."""
        num_groups = len(self.prompt_lengths)
        if (len(self.row_lengths), len(self.row_blocks)) != (num_rows, num_rows):
            raise ValueError(f"row_lengths and row_blocks must have {num_rows} rows, one for each new token")
        if (len(self.prompt_blocks), len(self.group_starts)) != (num_groups, num_groups + 1):
            raise ValueError(f"prompt_blocks must have {num_groups} rows and group_starts {num_groups + 1} entries")
        for name, tensor in vars(self).items():
            if tensor.dtype != torch.int32 or tensor.stride(-1) != 1:
                raise ValueError(f"{name} must be int32 with adjacent columns, got {tensor.dtype}")


def decode_attention(query: Tensor, key_cache: Tensor, value_cache: Tensor, context: PagedContext) -> Tensor:
    """out[n, h] = softmax(query[n, h] . K / sqrt(D)) V over row n's prompt and own tokens (arXiv:2309.06180).

    Args:
        query: [N, num_heads, D] fp32 or bf16; its rows may be strided (a slice of a fused QKV)
        key_cache, value_cache: [num_blocks, num_kv_heads, block_size, D] with the new tokens in it; what was never
            written must be finite (the reference masks it, but NaN would pass through)

    Returns:
        [N, num_heads, D]; padding rows hold zeros

    Raises:
        ValueError: shapes or types that do not fit together. Block ids are taken on trust.
    """
    _check(query, key_cache, value_cache, context)
    module = native_module()
    repeats = query.shape[1] // key_cache.shape[1]
    if module is None or not _heads_side_by_side(query) or not fits_native(key_cache, value_cache, repeats=repeats):
        return decode_attention_reference(query, key_cache, value_cache, context)
    num_heads, head_dim = query.shape[1:]
    num_kv_heads, block_size = key_cache.shape[1:3]
    out = torch.empty(query.shape, dtype=query.dtype)
    getattr(module, f"decode_attention_{_SUFFIX[query.dtype]}")(
        query.data_ptr(),
        out.data_ptr(),
        num_heads,
        query.stride(0),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        num_kv_heads,
        block_size,
        head_dim,
        context.group_starts.data_ptr(),
        len(context.prompt_lengths),
        context.prompt_blocks.data_ptr(),
        context.prompt_blocks.stride(0),
        context.prompt_lengths.data_ptr(),
        context.row_blocks.data_ptr(),
        context.row_blocks.stride(0),
        context.row_lengths.data_ptr(),
        num_threads(),
    )
    return out


def fits_native(key_cache: Tensor, value_cache: Tensor, *, repeats: int) -> bool:
    """Whether the kernel reads such a cache, for so many query heads a KV head."""
    return (
        key_cache.device.type == "cpu"
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
    if key_cache.shape != value_cache.shape or key_cache.ndim != 4:
        raise ValueError(
            f"key_cache and value_cache must both be [blocks, KV heads, block size, D], "
            f"got {list(key_cache.shape)} and {list(value_cache.shape)}"
        )
    if query.ndim != 3 or query.shape[2] != key_cache.shape[3] or query.shape[1] % key_cache.shape[1]:
        wanted = f"[N, a multiple of {key_cache.shape[1]} heads, {key_cache.shape[3]}]"
        raise ValueError(f"query must be {wanted}, got {list(query.shape)}")
    if not query.dtype == key_cache.dtype == value_cache.dtype:
        raise ValueError(
            f"query, key_cache and value_cache must have one dtype, "
            f"got {query.dtype}, {key_cache.dtype} and {value_cache.dtype}"
        )
    context.check(len(query))


def decode_attention_reference(query: Tensor, key_cache: Tensor, value_cache: Tensor, context: PagedContext) -> Tensor:
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
