"""Attention of one new token a row over a paged KV cache in which rows of a group share their prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class PagedContext:
    """Where the keys and values of a decode batch lie. Index tensors are int32, on the cache's device.

    N rows form consecutive groups; a row attends to its group's prompt, then to its own tokens. A block holds
    block_size consecutive tokens.
    """

    group_starts: Tensor  # [num_groups + 1] first row of each group; the last entry is N
    prompt_blocks: Tensor  # [num_groups, max_prompt_blocks] cache blocks of each prompt
    prompt_lengths: Tensor  # [num_groups] tokens
    row_blocks: Tensor  # [N, max_row_blocks] cache blocks of each row's own tokens
    row_lengths: Tensor  # [N] own tokens, the new one included; 0 marks a padding row


def decode_attention(query: Tensor, key_cache: Tensor, value_cache: Tensor, context: PagedContext) -> Tensor:
    """out[n, h] = softmax(query[n, h] . K / sqrt(D)) V over row n's prompt and own tokens (arXiv:2309.06180).

    Args:
        query: [N, num_heads, D]; its rows may be strided (a slice of a fused QKV)
        key_cache, value_cache: [num_blocks, num_kv_heads, block_size, D]; the new tokens are already in it

    Returns:
        [N, num_heads, D]; padding rows hold zeros
    """
    return decode_attention_reference(query, key_cache, value_cache, context)


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
    # A slot never written may hold NaN, which no mask removes from a sum.
    unused = ~visible[:, None, :, None]
    keys, values = keys.masked_fill(unused, 0), values.masked_fill(unused, 0)
    grouped = query.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=visible[:, None, None, :])
    out = out.reshape(num_rows, num_heads, head_dim)
    return out.masked_fill((context.row_lengths == 0)[:, None, None], 0)
