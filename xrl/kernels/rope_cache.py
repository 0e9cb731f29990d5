"""What happens between the QKV product and attention when decoding: QK norm, rotary embedding, KV-cache write."""

from __future__ import annotations

import torch
from torch import Tensor

from xrl.kernels.rms_norm import rms_norm_reference


def rope_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
) -> None:
    """Normalise and rotate queries and keys in place, and store keys and values in the paged cache.

    Args:
        qkv: [N, num_heads + 2 * num_kv_heads, D] queries, keys and values of N tokens; queries and keys are overwritten
        cos, sin: [max_positions, D / 2] fp32 rotary tables (arXiv:2104.09864, halves rotated as in Llama)
        positions: [N] int32 row of the tables for each token
        q_norm, k_norm: [D] RMSNorm weights of each head's query and key (Qwen3), or None for no norm
        key_cache, value_cache: [num_blocks, num_kv_heads, block_size, D]
        slots: [N] int32 cache slot of each token, block * block_size + offset; -1 stores nothing
    """
    rope_cache_reference(qkv, cos, sin, positions, q_norm, k_norm, eps, key_cache, value_cache, slots)


def rope_cache_reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
) -> None:
    """The specification of `rope_cache`, in plain PyTorch."""
    num_kv_heads, block_size = key_cache.shape[1:3]
    num_heads = qkv.shape[1] - 2 * num_kv_heads
    query, key, value = qkv.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    cos, sin = cos[positions.long(), None], sin[positions.long(), None]
    for heads, norm in ((query, q_norm), (key, k_norm)):
        normed = heads if norm is None else rms_norm_reference(heads, norm, eps)
        first, second = normed.float().chunk(2, dim=-1)
        heads.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))
    stored = (slots >= 0).nonzero()[:, 0]
    block, offset = slots[stored].long() // block_size, slots[stored].long() % block_size
    key_cache[block, :, offset] = key[stored]
    value_cache[block, :, offset] = value[stored]
