"""All layers of a dense decoder for one new token a row: on the CPU in fp32 in one call.

The kernel computes what the operations one after the other do, to the last bit; its threads take their rows through all
layers instead of meeting after each operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xrl.kernels.decode_attention import PagedContext, decode_attention, fits_native
from xrl.kernels.native import native_module
from xrl.kernels.packed_linear import PackedLinear, PackedSwiGLU
from xrl.kernels.rms_norm import rms_norm
from xrl.kernels.rope_cache import rope_cache
from xrl.kernels.threads import num_threads


@dataclass(frozen=True, kw_only=True)
class DecodeLayer:
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


def decode_layers(
    x: Tensor,
    layers: Sequence[DecodeLayer],
    context: PagedContext,
    rope: RopeTables,
    *,
    slots: Tensor,
    eps: float,
) -> Tensor:
    """Run the new tokens through the layers, and store their keys and values.

    Args:
        x: [N, H] the tokens' embeddings; may be overwritten
        layers: at least one, all of the same sizes
        slots: [N] int32 cache slot of each token, block * block_size + offset; -1 stores nothing
        eps: of every norm

    Returns:
        [N, H]

    Raises:
        ValueError: shapes or types that do not fit together. Positions, slots and block ids are taken on trust.
    """
    _check(x, layers, context, rope, slots)
    if not _is_native(x, layers, rope):
        return reference_decode_layers(x, layers, context, rope, slots=slots, eps=eps)
    first = layers[0]
    num_kv_heads, block_size, head_dim = first.keys.shape[1:]
    native_module().decode_layers(  # type: ignore[union-attr]
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
        num_threads(),
    )
    return x


def reference_decode_layers(
    x: Tensor,
    layers: Sequence[DecodeLayer],
    context: PagedContext,
    rope: RopeTables,
    *,
    slots: Tensor,
    eps: float,
) -> Tensor:
    """The specification of `decode_layers`: one operation after the other."""
    for layer in layers:
        head_dim = layer.keys.shape[3]
        qkv = layer.qkv(rms_norm(x, layer.input_norm, eps)).view(len(x), -1, head_dim)
        tables = (rope.cos, rope.sin, rope.positions)
        rope_cache(qkv, *tables, layer.q_norm, layer.k_norm, eps, layer.keys, layer.values, slots)
        queries = qkv[:, : layer.attention_out.in_features // head_dim]
        attended = decode_attention(queries, layer.keys, layer.values, context).flatten(1)
        x = layer.attention_out.plus(attended, x)
        x = layer.down.plus(layer.gate_up(rms_norm(x, layer.mlp_norm, eps)), x)
    return x


def _is_native(x: Tensor, layers: Sequence[DecodeLayer], rope: RopeTables) -> bool:
    """Whether the kernel takes such layers."""
    if native_module() is None or not x.is_cpu:
        return False
    tensors: list[Tensor | None] = [x, rope.cos, rope.sin]
    for layer in layers:
        packed = (layer.qkv.own, layer.attention_out.own, layer.gate_up.own, layer.down.own)
        if any(weight is None for weight in packed):
            return False
        if layer.attention_out.bias is not None or layer.down.bias is not None:
            return False
        tensors += [layer.input_norm, layer.qkv.bias, layer.q_norm, layer.k_norm, layer.mlp_norm]
        tensors += [layer.keys, layer.values]
    for tensor in tensors:
        if tensor is not None and not (tensor.dtype == torch.float32 and tensor.is_contiguous()):
            return False
    keys, values, queries = layers[0].keys, layers[0].values, layers[0].attention_out.in_features
    return fits_native(keys, values, repeats=queries // keys.shape[3] // keys.shape[1])


def _addresses(layer: DecodeLayer) -> tuple[int, ...]:
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


def _check(x: Tensor, layers: Sequence[DecodeLayer], context: PagedContext, rope: RopeTables, slots: Tensor) -> None:
    if not layers:
        raise ValueError("at least one layer is needed")
    first = layers[0]
    hidden, ffn, cache = first.down.out_features, first.down.in_features, first.keys.shape
    queries = first.attention_out.in_features
    if len(cache) != 4 or queries % (cache[1] * cache[3]):
        raise ValueError(
            f"keys must be [blocks, KV heads, block size, D], whole times as many query heads, got {list(cache)} "
            f"and {queries} query columns"
        )
    if x.ndim != 2 or x.shape[1] != hidden:
        raise ValueError(f"x must be [N, {hidden}], got {list(x.shape)}")
    context.check(len(x))
    for name, index in (("positions", rope.positions), ("slots", slots)):
        if index.dtype != torch.int32 or index.shape != (len(x),) or not index.is_contiguous():
            raise ValueError(f"{name} must be int32 [{len(x)}], got {index.dtype} {list(index.shape)}")
    half = cache[3] // 2
    for name, table in (("cos", rope.cos), ("sin", rope.sin)):
        if table.dtype != torch.float32 or table.shape[1:] != (half,) or not table.is_contiguous():
            raise ValueError(f"{name} must be fp32 [positions, {half}], got {table.dtype} {list(table.shape)}")
    products = [(hidden, queries + 2 * cache[1] * cache[3]), (queries, hidden), (hidden, ffn), (ffn, hidden)]
    for number, layer in enumerate(layers):
        linears = (layer.qkv, layer.attention_out, layer.gate_up, layer.down)
        if [(linear.in_features, linear.out_features) for linear in linears] != products:
            raise ValueError(f"layer {number}: products from and to {products} are needed, in their order")
        if layer.keys.shape != cache or layer.values.shape != cache:
            raise ValueError(f"layer {number}: keys and values must be {list(cache)}, got {list(layer.keys.shape)}")
        heads = [(norm, cache[3]) for norm in (layer.q_norm, layer.k_norm)]
        norms = [(layer.input_norm, hidden), (layer.mlp_norm, hidden), *heads]
        if any(norm is not None and norm.shape != (size,) for norm, size in norms):
            raise ValueError(f"layer {number}: norms must be [{hidden}] or, of the heads, [{cache[3]}]")
