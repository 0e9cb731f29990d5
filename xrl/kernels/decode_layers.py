"""All layers of a dense decoder for one new token a row: on the CPU in fp32 in one call.

The kernel computes what the operations one after the other do, to the last bit; its threads take their rows through all
layers instead of meeting after each operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xrl.kernels.arguments import (
    address,
    check_floats,
    check_index,
    check_instance,
    check_no_gradient,
    check_number,
    check_range,
    check_tensor,
)
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
        ValueError: shapes, types or devices that do not fit together, caches that share memory, or (on the CPU) a
            position, a slot or a context that leads out of its table.
        TypeError: an argument is of another kind.
    """
    _check(x, layers, context, rope, slots, eps)
    first = layers[0]
    num_blocks, num_kv_heads, block_size, head_dim = first.keys.shape
    if not _is_native(x, layers, rope):
        # Before the first operation stores anything.
        context.check_values(num_blocks, block_size)
        check_range("positions", rope.positions, 0, len(rope.cos))
        check_range("slots", slots, -1, num_blocks * block_size)
        return reference_decode_layers(x, layers, context, rope, slots=slots, eps=eps)
    native_module().decode_layers(  # type: ignore[union-attr]
        address(x),
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
        (len(x), address(rope.positions), address(slots), address(rope.cos), address(rope.sin), len(rope.cos)),
        context.addresses(),
        num_blocks,
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
    packed = (layer.qkv.own, layer.attention_out.own, layer.gate_up.own, layer.down.own)
    qkv, attention_out, gate_up, down = (weight.data_ptr() for weight in packed if weight is not None)
    return (
        address(layer.input_norm),
        qkv,
        address(layer.qkv.bias),
        address(layer.q_norm),
        address(layer.k_norm),
        attention_out,
        address(layer.mlp_norm),
        gate_up,
        down,
        address(layer.keys),
        address(layer.values),
    )


def _check(
    x: Tensor, layers: Sequence[DecodeLayer], context: PagedContext, rope: RopeTables, slots: Tensor, eps: float
) -> None:
    check_instance("context", context, PagedContext)
    check_instance("rope", rope, RopeTables)
    if not isinstance(layers, Sequence) or not all(isinstance(layer, DecodeLayer) for layer in layers):
        raise TypeError("layers must be a sequence of DecodeLayer")
    if not layers:
        raise ValueError("at least one layer is needed")
    first = layers[0]
    check_instance("down", first.down, PackedLinear)
    check_instance("attention_out", first.attention_out, PackedLinear)
    hidden, ffn = first.down.out_features, first.down.in_features
    queries = first.attention_out.in_features
    check_floats("x", x, (None, hidden))
    check_tensor("keys", first.keys, (None, None, None, None), like=x)
    cache = first.keys.shape
    if 0 in cache[1:] or queries % (cache[1] * cache[3]) or cache[3] % 2:
        raise ValueError(
            f"keys must be [blocks, KV heads, block size, D], whole times as many query heads, got {list(cache)} "
            f"and {queries} query columns"
        )
    num_rows, half = len(x), cache[3] // 2
    context.check(num_rows, x.device)
    check_index("positions", rope.positions, (num_rows,), device=x.device)
    check_index("slots", slots, (num_rows,), device=x.device)
    check_tensor("cos", rope.cos, (None, half), like=x, dtype=torch.float32)
    check_tensor("sin", rope.sin, rope.cos.shape, like=x, dtype=torch.float32)
    check_number("eps", eps, lowest=0.0)
    check_no_gradient("decode_layers", x=x, cos=rope.cos, sin=rope.sin)
    products = [(hidden, queries + 2 * cache[1] * cache[3]), (queries, hidden), (hidden, ffn), (ffn, hidden)]
    is_recorded = torch.is_grad_enabled()
    for number, layer in enumerate(layers):
        linears = (layer.qkv, layer.attention_out, layer.gate_up, layer.down)
        if tuple(map(type, linears)) != (PackedLinear, PackedLinear, PackedSwiGLU, PackedLinear):
            raise TypeError(f"layer {number}: gate_up must be a PackedSwiGLU, the other products a PackedLinear")
        if [(linear.in_features, linear.out_features) for linear in linears] != products:
            raise ValueError(f"layer {number}: products from and to {products} are needed, in their order")
        # Two dozen layers at each token: what fits is seen at a glance, and only the rest asked what is wrong with it.
        if is_recorded or not _fits(layer, x, cache, (hidden,), cache[3:]):
            _check_layer(number, layer, x, cache, hidden)


def _fits(layer: DecodeLayer, x: Tensor, cache: torch.Size, hidden: tuple[int, ...], head: tuple[int, ...]) -> bool:
    """Whether a layer's tensors are of these shapes and of the kind of x."""
    dtype, is_cpu = x.dtype, x.is_cpu
    tensors = [layer.keys, layer.values, layer.input_norm, layer.mlp_norm]
    try:
        if not (layer.keys.shape == layer.values.shape == cache):
            return False
        if not (layer.input_norm.shape == layer.mlp_norm.shape == hidden):
            return False
        for norm in (layer.q_norm, layer.k_norm):
            if norm is not None:
                if norm.shape != head:
                    return False
                tensors.append(norm)
        for tensor in tensors:
            if tensor.dtype is not dtype or tensor.is_cpu is not is_cpu:
                return False
            if tensor.layout is not torch.strided or tensor.is_neg():
                return False
    except AttributeError:  # no tensor
        return False
    return True


def _check_layer(number: int, layer: DecodeLayer, x: Tensor, cache: torch.Size, hidden: int) -> None:
    sizes = {"keys": cache, "values": cache, "input_norm": (hidden,), "mlp_norm": (hidden,)}
    heads = {"q_norm": layer.q_norm, "k_norm": layer.k_norm}
    try:
        for name, size in sizes.items():
            check_tensor(name, getattr(layer, name), size, like=x)
        for name, norm in heads.items():
            if norm is not None:
                check_tensor(name, norm, cache[3:], like=x)
    except (TypeError, ValueError) as error:
        raise type(error)(f"layer {number}: {error}") from None
    check_no_gradient("decode_layers", **{name: getattr(layer, name) for name in sizes}, **heads)
