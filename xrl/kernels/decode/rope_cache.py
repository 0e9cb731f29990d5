"""What happens between the QKV product and attention when decoding: QK norm, rotary embedding, KV-cache write."""

from __future__ import annotations

import torch
from torch import Tensor

from xrl.kernels.arguments import (
    address,
    check_apart,
    check_floats,
    check_no_gradient,
    check_number,
    check_range,
    check_tensor,
)
from xrl.kernels.decode.rms_norm import reference_rms_norm
from xrl.kernels.native import native_module
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
        ValueError: shapes, types or devices that do not fit together, qkv and caches that share memory, or (on the CPU)
            a position or slot that there is not. Two tokens of one slot are not noticed.
        TypeError: what should be a tensor is none.
    """
    _check(qkv, cos, sin, positions, q_norm, k_norm, eps, key_cache, value_cache, slots)
    module = native_module()
    tensors = (qkv, cos, sin, positions, q_norm, k_norm, key_cache, value_cache, slots)
    is_dense = all(tensor is None or tensor.is_contiguous() for tensor in tensors)
    num_blocks, num_kv_heads, block_size = key_cache.shape[:3]
    if module is None or not qkv.is_cpu or not is_dense or qkv.dtype not in _SUFFIX:
        check_range("positions", positions, 0, len(cos))
        check_range("slots", slots, -1, num_blocks * block_size)
        check_apart(
            {"qkv": qkv, "key_cache": key_cache, "value_cache": value_cache},
            {"cos": cos, "sin": sin, "positions": positions, "slots": slots, "q_norm": q_norm, "k_norm": k_norm},
        )
        reference_rope_cache(qkv, cos, sin, positions, q_norm, k_norm, eps, key_cache, value_cache, slots)
        return
    getattr(module, f"rope_cache_{_SUFFIX[qkv.dtype]}")(
        qkv=(address(qkv), len(qkv), qkv.shape[1] - 2 * num_kv_heads, num_kv_heads, qkv.shape[2]),
        rope=(address(positions), address(cos), address(sin), len(cos), address(q_norm), address(k_norm), eps),
        cache=(address(slots), address(key_cache), address(value_cache), num_blocks, block_size),
        num_threads=num_threads(),
    )


def _check(
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
    check_floats("qkv", qkv, (None, None, None))
    num_tokens, num_heads, head_dim = qkv.shape
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"qkv must be [N, heads, an even size], got {list(qkv.shape)}")
    check_tensor("key_cache", key_cache, (None, None, None, head_dim), like=qkv)
    check_tensor("value_cache", value_cache, key_cache.shape, like=qkv)
    num_kv_heads, block_size = key_cache.shape[1:3]
    if num_kv_heads < 1 or block_size < 1:
        raise ValueError(f"key_cache must have a KV head and blocks of a token or more, got {list(key_cache.shape)}")
    if num_heads <= 2 * num_kv_heads:
        raise ValueError(f"qkv must have more than the 2 * {num_kv_heads} heads of keys and values, got {num_heads}")
    check_tensor("cos", cos, (None, head_dim // 2), like=qkv, dtype=torch.float32)
    check_tensor("sin", sin, cos.shape, like=qkv, dtype=torch.float32)
    check_tensor("positions", positions, (num_tokens,), like=qkv, dtype=torch.int32)
    check_tensor("slots", slots, (num_tokens,), like=qkv, dtype=torch.int32)
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            check_tensor(name, norm, (head_dim,), like=qkv)
    check_number("eps", eps, lowest=0.0)
    check_no_gradient("rope_cache", qkv=qkv, q_norm=q_norm, k_norm=k_norm, cos=cos, sin=sin)
    check_no_gradient("rope_cache", key_cache=key_cache, value_cache=value_cache)


def reference_rope_cache(
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
        normed = heads if norm is None else reference_rms_norm(heads, norm, eps)
        first, second = normed.float().chunk(2, dim=-1)
        heads.copy_(torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1))
    stored = (slots >= 0).nonzero()[:, 0]
    block, offset = slots[stored].long() // block_size, slots[stored].long() % block_size
    key_cache[block, :, offset] = key[stored]
    value_cache[block, :, offset] = value[stored]
