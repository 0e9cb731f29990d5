"""All layers in one call against the operations one after the other: the same numbers, to the last bit."""

import dataclasses

import pytest
import torch
from torch import Tensor

from tests.kernels.decode.test_decode_attention import make_batch
from xrl.kernels.decode.decode_attention import PagedContext
from xrl.kernels.decode.decode_layers import DecodeLayer, LayerStack, RopeTables, decode_layers, reference_decode_layers
from xrl.kernels.decode.packed_linear import PackedLinear, PackedSwiGLU
from xrl.kernels.matmul import has_matmul

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM = 48, 80, 4, 2, 16
EPS = 1e-6

needs_kernel = pytest.mark.skipif(not has_matmul(torch.ones(1, 1)), reason="no compiled products for this machine")


def make_layer(
    keys: Tensor, values: Tensor, *, seed: int, qk_norm: bool = True, qkv_bias: bool = False, out_bias: bool = False
) -> DecodeLayer:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    qkv_width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    return DecodeLayer(
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


def newest_slots(context: PagedContext, block_size: int) -> Tensor:
    newest = context.row_lengths.long() - 1
    blocks = context.row_blocks.gather(1, newest.clamp(min=0)[:, None] // block_size)[:, 0].long()
    return torch.where(newest < 0, -1, blocks * block_size + newest % block_size).int()


BATCHES = {
    "few rows, all threads at each product": {"prompt_lengths": [5, 33], "group_sizes": [3, 4]},
    "a group on the border of two threads": {"prompt_lengths": [21, 40, 7], "group_sizes": [60, 70, 71]},
    "one group for all threads": {"prompt_lengths": [50], "group_sizes": [200]},
    "groups without rows": {"prompt_lengths": [3, 5, 9, 4], "group_sizes": [0, 90, 0, 70]},
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

    expected = reference_decode_layers(x, theirs, context, rope, slots=slots, eps=EPS)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        out = decode_layers(x.clone(), ours, context, rope, slots=slots, eps=EPS)
    finally:
        torch.set_num_threads(threads_before)
    assert torch.equal(out, expected)
    for layer, other in zip(ours, theirs, strict=True):
        assert torch.equal(layer.keys, other.keys)
        assert torch.equal(layer.values, other.values)
    assert not torch.equal(ours[2].keys, keys)


def small_batch(num_rows: int = 2) -> tuple[list[DecodeLayer], PagedContext, RopeTables, Tensor]:
    _, keys, values, context = make_batch([4], [num_rows], num_kv_heads=KV_HEADS, head_dim=HEAD_DIM)
    angles = torch.rand(90, HEAD_DIM // 2, generator=torch.Generator().manual_seed(0))
    rope = RopeTables(positions=torch.zeros(num_rows).int(), cos=angles.cos(), sin=angles.sin())
    layers = [make_layer(keys, values, seed=seed, out_bias=True) for seed in range(2)]
    return layers, context, rope, newest_slots(context, keys.shape[2])


@pytest.mark.parametrize("lacking", ["bias of the output", "the module", "strided cache"])
def test_what_the_kernel_lacks_is_computed_one_by_one(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layers, context, rope, slots = small_batch()
    if lacking != "bias of the output":
        layers = [dataclasses.replace(layer, attention_out=PackedLinear(torch.eye(HIDDEN, 64))) for layer in layers]
    if lacking == "the module":
        monkeypatch.setattr("xrl.kernels.decode.decode_layers.native_module", lambda: None)
    if lacking == "strided cache":
        layers = [
            dataclasses.replace(layer, keys=layer.keys.mT.contiguous().mT, values=layer.values.mT.contiguous().mT)
            for layer in layers
        ]
    copies = [
        dataclasses.replace(layer, keys=layer.keys.contiguous().clone(), values=layer.values.contiguous().clone())
        for layer in layers
    ]
    x = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(1))
    out = decode_layers(x.clone(), layers, context, rope, slots=slots, eps=EPS)
    expected = reference_decode_layers(x, copies, context, rope, slots=slots, eps=EPS)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(out, x)


def test_bad_arguments_are_refused() -> None:
    layers, context, rope, slots = small_batch()
    x = torch.randn(2, HIDDEN)

    def run(match: str, **changes: object) -> None:
        arguments = {"x": x, "layers": layers, "context": context, "rope": rope, "slots": slots, **changes}
        with pytest.raises(ValueError, match=match):
            decode_layers(**arguments, eps=EPS)

    run("x must be", x=x[:, 1:])
    run(r"row_blocks must be int32 \[3, \*\]", x=torch.randn(3, HIDDEN))
    run("at least one layer", layers=[])
    run("keys must be", layers=[dataclasses.replace(layers[0], keys=layers[0].keys[0])])
    run("keys must be", layers=[dataclasses.replace(layers[0], attention_out=PackedLinear(torch.eye(HIDDEN, 60)))])
    run("slots must be", slots=slots[:1])
    run("cos must be", rope=dataclasses.replace(rope, cos=rope.cos[:, 1:]))
    run("layer 1: products", layers=[layers[0], dataclasses.replace(layers[1], down=PackedLinear(torch.eye(8)))])
    run("layer 1: keys", layers=[layers[0], dataclasses.replace(layers[1], keys=layers[1].keys[1:])])
    run("layer 0: q_norm", layers=[dataclasses.replace(layers[0], q_norm=torch.ones(3)), layers[1]])
    run("sin must be", rope=dataclasses.replace(rope, sin=rope.sin[1:]))
    run("layer 1: mlp_norm", layers=[layers[0], dataclasses.replace(layers[1], mlp_norm=torch.ones(3))])


@needs_kernel
def test_rows_that_no_group_has_are_refused() -> None:
    layers, context, rope, slots = small_batch()
    layers = [dataclasses.replace(layer, attention_out=PackedLinear(torch.eye(HIDDEN, 64))) for layer in layers]
    context = dataclasses.replace(context, group_starts=torch.tensor([0, 1]).int())
    with pytest.raises(ValueError, match="group_starts must go from 0 to 2"):
        decode_layers(torch.randn(2, HIDDEN), layers, context, rope, slots=slots, eps=EPS)


def run_stack(stack: LayerStack, num_rows: int = 2) -> Tensor:
    _, context, rope, slots = small_batch(num_rows)
    x = torch.randn(num_rows, HIDDEN, generator=torch.Generator().manual_seed(1))
    return decode_layers(x, stack, context, rope, slots=slots, eps=EPS)


def kernel_layers() -> list[DecodeLayer]:
    layers, _, _, _ = small_batch()
    return [dataclasses.replace(layer, attention_out=PackedLinear(torch.eye(HIDDEN, 64))) for layer in layers]


@needs_kernel
def test_a_stack_reads_where_its_tensors_are_now() -> None:
    layers = kernel_layers()
    stack = LayerStack(layers)
    with torch.no_grad():
        before = run_stack(stack)
        layers[1].mlp_norm.data = layers[1].mlp_norm * 2  # elsewhere
        moved = run_stack(stack)
        assert not torch.equal(moved, before)
        assert torch.equal(moved, run_stack(LayerStack(layers)))


@pytest.mark.parametrize("lacking", ["nothing", "the module"])
def test_a_stack_that_was_checked_refuses_what_no_longer_fits(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if lacking == "the module":
        monkeypatch.setattr("xrl.kernels.decode.decode_layers.native_module", lambda: None)
    layers = kernel_layers()
    stack = LayerStack(layers)
    keys, norm = layers[1].keys, layers[0].q_norm
    assert norm is not None
    with torch.no_grad():
        run_stack(stack)

        elsewhere, keys.data = keys.data, keys.data[1:]
        with pytest.raises(ValueError, match="layer 1: keys must be"):
            run_stack(stack)
        keys.data = elsewhere

        keys.resize_(keys.shape[0] - 1, *keys.shape[1:])  # where it was
        with pytest.raises(ValueError, match="layer 1: keys must be"):
            run_stack(stack)
        keys.resize_(elsewhere.shape)

        elsewhere, norm.data = norm.data, norm.data.double()
        with pytest.raises(ValueError, match="layer 0: q_norm must be"):
            run_stack(stack)
        norm.data = elsewhere

        run_stack(stack)
    norm.requires_grad_()
    with pytest.raises(ValueError, match="q_norm must need no gradient"):
        run_stack(stack)


@needs_kernel
def test_a_stack_sees_that_memory_was_given_back() -> None:
    layers = kernel_layers()
    stack = LayerStack(layers)
    with torch.no_grad():
        run_stack(stack)
        layers[1].values.untyped_storage().resize_(0)
        with pytest.raises(ValueError, match="has no memory"):
            run_stack(stack)


def test_a_step_looks_itself_whether_its_input_is_of_the_stack_s_kind() -> None:
    layers, context, rope, slots = small_batch()
    stack = LayerStack(layers)
    with torch.no_grad():
        run_stack(stack)
        with pytest.raises(ValueError, match="^keys must be torch.float64"):
            decode_layers(torch.randn(2, HIDDEN).double(), stack, context, rope, slots=slots, eps=EPS)
