"""What happens between the QKV product and attention when decoding: QK norm, rotary embedding, KV-cache write."""

from __future__ import annotations

import torch
from torch import Tensor

from xrl.kernels.native import native_module
from xrl.kernels.rms_norm import rms_norm_reference
from xrl.kernels.threads import num_threads

_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


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

    Raises:
        ValueError: shapes or types that do not fit together. Positions and slots are taken on trust.
    """
    _check(qkv, cos, sin, positions, q_norm, k_norm, key_cache, value_cache, slots)
    module = native_module()
    tensors = (qkv, cos, sin, positions, key_cache, value_cache, slots)
    on_cpu = all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors)
    if module is None or not on_cpu or qkv.dtype not in _SUFFIX:
        rope_cache_reference(qkv, cos, sin, positions, q_norm, k_norm, eps, key_cache, value_cache, slots)
        return
    num_kv_heads, block_size = key_cache.shape[1:3]
    getattr(module, f"rope_cache_{_SUFFIX[qkv.dtype]}")(
        qkv.data_ptr(),
        len(qkv),
        qkv.shape[1] - 2 * num_kv_heads,
        num_kv_heads,
        qkv.shape[2],
        positions.data_ptr(),
        slots.data_ptr(),
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        block_size,
        cos.data_ptr(),
        sin.data_ptr(),
        0 if q_norm is None else q_norm.data_ptr(),
        0 if k_norm is None else k_norm.data_ptr(),
        eps,
        num_threads(),
    )


def _check(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    key_cache: Tensor,
    value_cache: Tensor,
    slots: Tensor,
) -> None:
    head_dim = qkv.shape[-1]
    if key_cache.ndim != 4 or key_cache.shape != value_cache.shape or key_cache.shape[3] != head_dim:
        raise ValueError(
            f"key_cache and value_cache must both be [blocks, KV heads, block size, {head_dim}], "
            f"got {list(key_cache.shape)} and {list(value_cache.shape)}"
        )
    if qkv.ndim != 3 or head_dim % 2 or qkv.shape[1] <= 2 * key_cache.shape[1]:
        raise ValueError(f"qkv must be [N, heads + 2 * {key_cache.shape[1]}, an even size], got {list(qkv.shape)}")
    if not qkv.dtype == key_cache.dtype == value_cache.dtype:
        raise ValueError(f"qkv and the caches must have one dtype, got {qkv.dtype} and {key_cache.dtype}")
    if cos.dtype != torch.float32 or cos.shape != sin.shape or cos.shape[1:] != (head_dim // 2,):
        raise ValueError(f"cos and sin must be fp32 [positions, {head_dim // 2}], got {list(cos.shape)} {cos.dtype}")
    for name, index in (("positions", positions), ("slots", slots)):
        if index.dtype != torch.int32 or index.shape != (len(qkv),):
            raise ValueError(f"{name} must be int32 [{len(qkv)}], got {index.dtype} {list(index.shape)}")
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None and (norm.dtype != qkv.dtype or norm.shape != (head_dim,)):
            raise ValueError(f"{name} must be {qkv.dtype} [{head_dim}], got {norm.dtype} {list(norm.shape)}")


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
