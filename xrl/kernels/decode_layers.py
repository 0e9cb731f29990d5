"""All layers of a dense decoder for one new token a row in one call: fp32, on the CPU.

It computes what `rms_norm`, `PackedLinear`, `rope_cache`, `decode_attention` and `PackedSwiGLU` do one after the other,
to the last bit; its threads take their rows through all layers instead of meeting after each operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xrl.kernels.decode_attention import PagedContext, fits_native
from xrl.kernels.native import native_module
from xrl.kernels.packed_linear import PackedLinear, PackedSwiGLU


@dataclass(frozen=True, kw_only=True)
class DecoderLayer:
    """H hidden size, D head size."""

    input_norm: Tensor  # [H]
    qkv: PackedLinear  # queries, keys and values in one product
    q_norm: Tensor | None  # [D]
    k_norm: Tensor | None  # [D]
    attention_out: PackedLinear
    mlp_norm: Tensor  # [H]
    gate_up: PackedSwiGLU
    down: PackedLinear
    keys: Tensor  # [num_blocks, num_kv_heads, block_size, D] this layer's part of the cache
    values: Tensor


@dataclass(frozen=True, kw_only=True)
class RopeTables:
    """Angles of N tokens."""

    positions: Tensor  # [N] int32 rows of the tables
    cos: Tensor  # [max_positions, D / 2] fp32
    sin: Tensor


def can_run(layer: DecoderLayer) -> bool:
    """Whether `decode_layers` takes layers such as this one."""
    packed = (layer.qkv.own, layer.attention_out.own, layer.gate_up.own, layer.down.own)
    if native_module() is None or any(weight is None for weight in packed):
        return False
    if layer.attention_out.bias is not None or layer.down.bias is not None:
        return False
    num_kv_heads, _, head_dim = layer.keys.shape[1:]
    repeats = layer.attention_out.in_features // head_dim // num_kv_heads
    return fits_native(layer.keys, layer.values, repeats=repeats)


def decode_layers(
    x: Tensor,
    layers: Sequence[DecoderLayer],
    context: PagedContext,
    rope: RopeTables,
    *,
    slots: Tensor,
    eps: float,
) -> None:
    """Run the new tokens through the layers, and store their keys and values.

    Args:
        x: [N, H] fp32 the tokens' embeddings; overwritten by what the last layer makes of them
        layers: such as `can_run` agrees to
        slots: [N] int32 cache slot of each token, block * block_size + offset; -1 stores nothing
        eps: of every norm

    Raises:
        ValueError: shapes or types that do not fit together. Positions, slots and block ids are taken on trust.
    """
    first = layers[0]
    num_kv_heads, block_size, head_dim = first.keys.shape[1:]
    _check(x, first, context, rope, slots)
    module = native_module()
    assert module is not None, "can_run says no"
    module.decode_layers(
        x.data_ptr(),
        [_addresses(layer) for layer in layers],
        (
            first.down.out_features,
            first.down.in_features,
            first.attention_out.in_features // head_dim,
            num_kv_heads,
            head_dim,
            block_size,
            eps,
        ),
        (
            len(x),
            rope.positions.data_ptr(),
            slots.data_ptr(),
            context.group_starts.data_ptr(),
            len(context.prompt_lengths),
            context.prompt_blocks.data_ptr(),
            context.prompt_blocks.stride(0),
            context.prompt_lengths.data_ptr(),
            context.row_blocks.data_ptr(),
            context.row_blocks.stride(0),
            context.row_lengths.data_ptr(),
            rope.cos.data_ptr(),
            rope.sin.data_ptr(),
        ),
        torch.get_num_threads(),
    )


def _addresses(layer: DecoderLayer) -> tuple[int, ...]:
    tensors = (
        layer.input_norm,
        layer.qkv.own,
        layer.qkv.bias,
        layer.q_norm,
        layer.k_norm,
        layer.attention_out.own,
        layer.mlp_norm,
        layer.gate_up.own,
        layer.down.own,
        layer.keys,
        layer.values,
    )
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)


def _check(x: Tensor, layer: DecoderLayer, context: PagedContext, rope: RopeTables, slots: Tensor) -> None:
    if x.shape[1:] != layer.input_norm.shape or x.dtype != torch.float32 or not (x.is_cpu and x.is_contiguous()):
        raise ValueError(f"x must be contiguous fp32 [N, {len(layer.input_norm)}], got {x.dtype} {list(x.shape)}")
    context.check(len(x))
    for name, index in (("positions", rope.positions), ("slots", slots)):
        if index.dtype != torch.int32 or index.shape != (len(x),) or not index.is_contiguous():
            raise ValueError(f"{name} must be int32 [{len(x)}], got {index.dtype} {list(index.shape)}")
    half = layer.keys.shape[3] // 2
    for name, table in (("cos", rope.cos), ("sin", rope.sin)):
        if table.dtype != torch.float32 or table.shape[1:] != (half,) or not table.is_contiguous():
            raise ValueError(f"{name} must be fp32 [positions, {half}], got {table.dtype} {list(table.shape)}")
