"""All layers in one call against the operations one after the other: the same numbers, to the last bit."""

import dataclasses

import pytest
import torch
from torch import Tensor

from tests.kernels.test_decode_attention import make_batch
from xrl.kernels.decode_attention import PagedContext, decode_attention
from xrl.kernels.decode_layers import DecoderLayer, RopeTables, can_run, decode_layers
from xrl.kernels.matmul import has_matmul
from xrl.kernels.packed_linear import PackedLinear, PackedSwiGLU
from xrl.kernels.rms_norm import rms_norm
from xrl.kernels.rope_cache import rope_cache

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM = 48, 80, 4, 2, 16
EPS = 1e-6

needs_kernel = pytest.mark.skipif(not has_matmul(torch.ones(1, 1)), reason="no compiled products for this machine")


def make_layer(
    keys: Tensor, values: Tensor, *, seed: int, qk_norm: bool = True, qkv_bias: bool = False, out_bias: bool = False
) -> DecoderLayer:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    qkv_width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    return DecoderLayer(
        input_norm=1 + normal(HIDDEN),
        qkv=PackedLinear(normal(qkv_width, HIDDEN), normal(qkv_width) if qkv_bias else None),
        q_norm=1 + normal(HEAD_DIM) if qk_norm else None,
        k_norm=1 + normal(HEAD_DIM) if qk_norm else None,
        attention_out=PackedLinear(normal(HIDDEN, HEADS * HEAD_DIM), normal(HIDDEN) if out_bias else None),
        mlp_norm=1 + normal(HIDDEN),
        gate_up=PackedSwiGLU(normal(2 * FFN, HIDDEN)),
        down=PackedLinear(normal(HIDDEN, FFN)),
        keys=keys.clone(),
        values=values.clone(),
    )


def one_by_one(x: Tensor, layers: list[DecoderLayer], context: PagedContext, rope: RopeTables, slots: Tensor) -> Tensor:
    for layer in layers:
        qkv = layer.qkv(rms_norm(x, layer.input_norm, EPS)).view(len(x), -1, HEAD_DIM)
        tables = (rope.cos, rope.sin, rope.positions)
        rope_cache(qkv, *tables, layer.q_norm, layer.k_norm, EPS, layer.keys, layer.values, slots)
        attended = decode_attention(qkv[:, :HEADS], layer.keys, layer.values, context).flatten(1)
        x = layer.attention_out.plus(attended, x)
        x = layer.down.plus(layer.gate_up(rms_norm(x, layer.mlp_norm, EPS)), x)
    return x


def newest_slots(context: PagedContext, block_size: int) -> Tensor:
    newest = context.row_lengths.long() - 1
    blocks = context.row_blocks.gather(1, newest.clamp(min=0)[:, None] // block_size)[:, 0].long()
    return torch.where(newest < 0, -1, blocks * block_size + newest % block_size).int()


BATCHES = {
    "few rows, all threads at each product": {"prompt_lengths": [5, 33], "group_sizes": [3, 4]},
    "a group on the border of two threads": {"prompt_lengths": [21, 40, 7], "group_sizes": [60, 70, 71]},
    "one group for all threads": {"prompt_lengths": [50], "group_sizes": [200]},
    "padding rows": {"prompt_lengths": [4, 17], "group_sizes": [100, 80], "num_padding": 12},
}


@needs_kernel
@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("model", [{}, {"qk_norm": False, "qkv_bias": True}], ids=["qk norm", "qkv bias"])
@pytest.mark.parametrize("name", BATCHES)
def test_layers_equal_their_operations(name: str, model: dict[str, bool], num_threads: int) -> None:
    sizes = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM}
    _, keys, values, context = make_batch(**BATCHES[name], **sizes)
    ours, theirs = ([make_layer(keys, values, seed=seed, **model) for seed in range(3)] for _ in range(2))
    num_rows = len(context.row_lengths)
    torch.manual_seed(0)
    x, angles = torch.randn(num_rows, HIDDEN), torch.rand(90, HEAD_DIM // 2) * 6
    rope = RopeTables(positions=torch.randint(90, (num_rows,)).int(), cos=angles.cos(), sin=angles.sin())
    slots = newest_slots(context, keys.shape[2])

    expected = one_by_one(x, theirs, context, rope, slots)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        decode_layers(x, ours, context, rope, slots=slots, eps=EPS)
    finally:
        torch.set_num_threads(threads_before)
    assert torch.equal(x, expected)
    for layer, other in zip(ours, theirs, strict=True):
        assert torch.equal(layer.keys, other.keys)
        assert torch.equal(layer.values, other.values)
    assert not torch.equal(ours[2].keys, keys)


@needs_kernel
def test_can_run_knows_what_the_kernel_lacks() -> None:
    _, keys, values, _ = make_batch([4], [2], num_kv_heads=KV_HEADS, head_dim=HEAD_DIM)
    assert can_run(make_layer(keys, values, seed=0))
    assert not can_run(make_layer(keys, values, seed=0, out_bias=True))
    assert not can_run(make_layer(keys.transpose(1, 2), values.transpose(1, 2), seed=0))
    wide = torch.randn(keys.shape[0], KV_HEADS, 16, 24)
    assert not can_run(make_layer(wide, wide, seed=0))


@needs_kernel
def test_bad_arguments_are_refused() -> None:
    _, keys, values, context = make_batch([4], [2], num_kv_heads=KV_HEADS, head_dim=HEAD_DIM)
    layers = [make_layer(keys, values, seed=0)]
    angles = torch.rand(90, HEAD_DIM // 2)
    rope = RopeTables(positions=torch.zeros(2).int(), cos=angles, sin=angles)
    slots, x = torch.zeros(2).int(), torch.randn(2, HIDDEN)
    with pytest.raises(ValueError, match="x must be"):
        decode_layers(x.double(), layers, context, rope, slots=slots, eps=EPS)
    with pytest.raises(ValueError, match="slots must be"):
        decode_layers(x, layers, context, rope, slots=slots[:1], eps=EPS)
    with pytest.raises(ValueError, match="cos must be"):
        decode_layers(x, layers, context, dataclasses.replace(rope, cos=angles[:, 1:]), slots=slots, eps=EPS)
    with pytest.raises(ValueError, match="must have 3 rows"):
        decode_layers(torch.randn(3, HIDDEN), layers, context, rope, slots=slots, eps=EPS)
