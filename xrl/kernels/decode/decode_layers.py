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
from xrl.kernels.decode.decode_attention import PagedContext, decode_attention, fits_native
from xrl.kernels.decode.packed_linear import PackedLinear, PackedSwiGLU
from xrl.kernels.decode.rms_norm import rms_norm
from xrl.kernels.decode.rope_cache import rope_cache
from xrl.kernels.native import native_module
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


class LayerStack:
    """The layers of a decoder, which remember what they were checked for, so that a step does not ask each one again.

    Their tensors may be written to between steps. Where one has moved, or has more or fewer elements, all are checked
    anew; turned in place (`transpose_`) they must not be.

    Args:
        layers: at least one

    Raises:
        ValueError: no layer.
        TypeError: something else than a layer.
    """

    def __init__(self, layers: Sequence[DecodeLayer]) -> None:
        if not isinstance(layers, Sequence) or not all(isinstance(layer, DecodeLayer) for layer in layers):
            raise TypeError("layers must be a sequence of DecodeLayer")
        if not layers:
            raise ValueError("at least one layer is needed")
        self.layers = tuple(layers)
        self._checked: _Checked | None = None

    def addresses(self, x: Tensor, sizes: _Sizes) -> Sequence[tuple[int, ...]] | None:
        """Where the tensors of each layer begin, as the kernel takes them; None where the kernel takes no such layers.

        Raises:
            ValueError, TypeError: as `decode_layers`.
        """
        checked = self._checked
        # A tensor may have come to need a gradient since, which only matters where one is recorded.
        if checked is None or torch.is_grad_enabled() or not checked.holds(sizes):
            _check_layers(self.layers, x, sizes)
            addresses = [_addresses(layer) for layer in self.layers] if _are_native(self.layers) else None
            checked = self._checked = _Checked.of(self.layers, sizes, addresses)
        return checked.addresses


def decode_layers(
    x: Tensor,
    layers: Sequence[DecodeLayer] | LayerStack,
    context: PagedContext,
    rope: RopeTables,
    *,
    slots: Tensor,
    eps: float,
) -> Tensor:
    """Run the new tokens through the layers, and store their keys and values.

    Args:
        x: [N, H] the tokens' embeddings; may be overwritten
        layers: at least one, all of the same sizes; a stack where they take many steps
        slots: [N] int32 cache slot of each token, block * block_size + offset; -1 stores nothing
        eps: of every norm

    Returns:
        [N, H]

    Raises:
        ValueError: shapes, types or devices that do not fit together, caches that share memory, or (on the CPU) a
            position, a slot or a context that leads out of its table.
        TypeError: an argument is of another kind.
    """
    check_instance("context", context, PagedContext)
    check_instance("rope", rope, RopeTables)
    stack = layers if isinstance(layers, LayerStack) else LayerStack(layers)
    sizes = _check_step(x, stack.layers[0], context, rope, slots, eps)
    addresses = stack.addresses(x, sizes)
    num_blocks, num_kv_heads, block_size, head_dim = sizes.cache
    module = native_module()
    if module is None or addresses is None or not all(map(_is_dense, (x, rope.cos, rope.sin))):
        # Before the first operation stores anything.
        context.check_values(num_blocks, block_size)
        check_range("positions", rope.positions, 0, len(rope.cos))
        check_range("slots", slots, -1, num_blocks * block_size)
        return reference_decode_layers(x, stack.layers, context, rope, slots=slots, eps=eps)
    module.decode_layers(
        x=address(x),
        layers=addresses,
        shape=(sizes.hidden, sizes.ffn, sizes.queries // head_dim, num_kv_heads, head_dim, block_size, eps),
        rows=(len(x), address(rope.positions), address(slots), address(rope.cos), address(rope.sin), len(rope.cos)),
        context=context.addresses(),
        num_blocks=num_blocks,
        num_threads=num_threads(),
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


@dataclass(frozen=True)
class _Sizes:
    """Of the layers of a stack, as its first layer says them."""

    hidden: int
    ffn: int
    queries: int  # columns
    cache: torch.Size  # [num_blocks, num_kv_heads, block_size, D] of keys and of values

    @property
    def products(self) -> list[tuple[int, int]]:
        """From and to so many columns, in the order in which they are computed."""
        mixed = self.queries + 2 * self.cache[1] * self.cache[3]
        return [(self.hidden, mixed), (self.queries, self.hidden), (self.hidden, self.ffn), (self.ffn, self.hidden)]


@dataclass(frozen=True, kw_only=True)
class _Checked:
    """What a stack was found to be, and for what."""

    sizes: _Sizes
    tensors: list[Tensor]  # all that the layers have
    pointers: list[int]  # to each
    unpacked: list[Tensor]  # those of them that are checked: packed weights come from where they were packed
    lengths: list[int]  # of each of these
    addresses: Sequence[tuple[int, ...]] | None

    @staticmethod
    def of(layers: Sequence[DecodeLayer], sizes: _Sizes, addresses: Sequence[tuple[int, ...]] | None) -> _Checked:
        tensors = [tensor for layer in layers for tensor in _tensors(layer) if tensor is not None]
        unpacked = [tensor for layer in layers for tensor in _checked_tensors(layer).values() if tensor is not None]
        return _Checked(
            sizes=sizes,
            tensors=tensors,
            pointers=list(map(Tensor.data_ptr, tensors)),
            unpacked=unpacked,
            lengths=list(map(Tensor.numel, unpacked)),
            addresses=addresses,
        )

    def holds(self, sizes: _Sizes) -> bool:
        """Whether it is still so, and for such sizes; that x is of the layers' kind, every step looks at itself."""
        return (
            self.sizes == sizes
            and list(map(Tensor.data_ptr, self.tensors)) == self.pointers
            and list(map(Tensor.numel, self.unpacked)) == self.lengths
        )


def _tensors(layer: DecodeLayer) -> tuple[Tensor | None, ...]:
    """In the order of DecodeLayer in csrc/cpu/decode_layers.h; of a product that is not packed by us none."""
    return (
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


def _addresses(layer: DecodeLayer) -> tuple[int, ...]:
    return tuple(map(address, _tensors(layer)))


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_cpu and tensor.dtype == torch.float32 and tensor.is_contiguous()


def _are_native(layers: Sequence[DecodeLayer]) -> bool:
    """Whether the kernel takes such layers, which fit each other."""
    for layer in layers:
        packed = (layer.qkv.own, layer.attention_out.own, layer.gate_up.own, layer.down.own)
        if any(weight is None for weight in packed):
            return False
        if layer.attention_out.bias is not None or layer.down.bias is not None:
            return False
        if not all(_is_dense(tensor) for tensor in _tensors(layer) if tensor is not None):
            return False
    keys, values, queries = layers[0].keys, layers[0].values, layers[0].attention_out.in_features
    return fits_native(keys, values, repeats=queries // keys.shape[3] // keys.shape[1])


def _check_step(
    x: Tensor, first: DecodeLayer, context: PagedContext, rope: RopeTables, slots: Tensor, eps: float
) -> _Sizes:
    """Check all but the layers, of whose sizes the first one's are taken."""
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
    return _Sizes(hidden, ffn, queries, cache)


def _check_layers(layers: Sequence[DecodeLayer], x: Tensor, sizes: _Sizes) -> None:
    products = sizes.products
    for number, layer in enumerate(layers):
        linears = (layer.qkv, layer.attention_out, layer.gate_up, layer.down)
        if tuple(map(type, linears)) != (PackedLinear, PackedLinear, PackedSwiGLU, PackedLinear):
            raise TypeError(f"layer {number}: gate_up must be a PackedSwiGLU, the other products a PackedLinear")
        if [(linear.in_features, linear.out_features) for linear in linears] != products:
            raise ValueError(f"layer {number}: products from and to {products} are needed, in their order")
        _check_layer(number, layer, x, sizes.cache, sizes.hidden)


def _check_layer(number: int, layer: DecodeLayer, x: Tensor, cache: torch.Size, hidden: int) -> None:
    shapes = {"keys": cache, "values": cache, "input_norm": (hidden,), "mlp_norm": (hidden,)}
    tensors = _checked_tensors(layer)
    try:
        for name, tensor in tensors.items():
            if name in shapes or tensor is not None:
                check_tensor(name, tensor, shapes.get(name, cache[3:]), like=x)
    except (TypeError, ValueError) as error:
        raise type(error)(f"layer {number}: {error}") from None
    check_no_gradient("decode_layers", **tensors)


def _checked_tensors(layer: DecodeLayer) -> dict[str, Tensor | None]:
    return {
        "keys": layer.keys,
        "values": layer.values,
        "input_norm": layer.input_norm,
        "mlp_norm": layer.mlp_norm,
        "q_norm": layer.q_norm,
        "k_norm": layer.k_norm,
    }
