"""A decoder layer as one operation against its reference in fp64, forward and backward."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from tests.kernels.layers.test_self_attention import packed
from xrl.kernels.layers.train_layer import (
    LayerInputs,
    LayerParameters,
    has_train_layer,
    reference_train_layer,
    train_layer,
)
from xrl.kernels.matmul import has_matmul

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM = 40, 56, 4, 2, 16

pytestmark = pytest.mark.skipif(not has_matmul(torch.ones(1, 1)), reason="no compiled products for this machine")


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_layer(*, qk_norm: bool = True, qkv_bias: bool = False) -> LayerParameters:
    qkv_width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    sizes = {
        "input_norm": (HIDDEN,),
        "qkv": (qkv_width, HIDDEN),
        "qkv_bias": (qkv_width,) if qkv_bias else None,
        "q_norm": (HEAD_DIM,) if qk_norm else None,
        "k_norm": (HEAD_DIM,) if qk_norm else None,
        "attention_out": (HIDDEN, HEADS * HEAD_DIM),
        "mlp_norm": (HIDDEN,),
        "gate_up": (2 * FFN, HIDDEN),
        "down": (HIDDEN, FFN),
    }
    tensors = {}
    for seed, (name, size) in enumerate(sizes.items()):
        if size is None:
            tensors[name] = None
        else:
            values = normal(*size, seed=seed) * size[-1] ** -0.5
            tensors[name] = ((1 + values) if "norm" in name else values).requires_grad_()
    return LayerParameters(**tensors)


def make_layer_inputs(num_rows: int, roots: list[int], branches: list[int], parents: list[int]) -> LayerInputs:
    angles = (torch.arange(num_rows)[:, None] * normal(HEAD_DIM // 2, seed=20)).repeat(1, 2)
    return LayerInputs(
        sequences=packed(roots, branches, parents),
        cos=angles.cos(),
        sin=angles.sin(),
        num_kv_heads=KV_HEADS,
        eps=1e-6,
        scale=HEAD_DIM**-0.5,
    )


def exact(layer: LayerParameters, inputs: LayerInputs) -> tuple[LayerParameters, LayerInputs]:
    double = {
        name: None if tensor is None else tensor.detach().double().requires_grad_()
        for name, tensor in vars(layer).items()
    }
    return LayerParameters(**double), dataclasses.replace(inputs, cos=inputs.cos.double(), sin=inputs.sin.double())


def assert_equal(found: Tensor | None, expected: Tensor | None) -> None:
    assert found is not None and expected is not None
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("model", [{}, {"qk_norm": False, "qkv_bias": True}], ids=["qk norm", "qkv bias"])
@pytest.mark.parametrize("num_padding", [0, 5])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_output_and_gradients_equal_the_reference(model: dict[str, bool], num_padding: int, num_threads: int) -> None:
    num_rows = 9 + 3 * 20 + 17 + num_padding
    inputs = make_layer_inputs(num_rows, [9, 17], [20, 20, 20], [0, 0, 0])
    layer = make_layer(**model)
    x = normal(num_rows, 1, HIDDEN, seed=10).requires_grad_()
    upstream = normal(num_rows, 1, HIDDEN, seed=11)
    assert has_train_layer(x, layer, inputs)
    layer64, inputs64 = exact(layer, inputs)
    x64 = x.detach().double().requires_grad_()
    expected = reference_train_layer(x64, layer64, inputs64)
    expected.backward(upstream.double())

    threads_before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        out = train_layer(x, layer, inputs)
        out.backward(upstream)
    finally:
        torch.set_num_threads(threads_before)
    assert_equal(out, expected)
    assert_equal(x.grad, x64.grad)
    for name, tensor in vars(layer).items():
        if tensor is not None:
            assert_equal(tensor.grad, getattr(layer64, name).grad)


def test_gradients_that_megatron_keeps_are_added_there() -> None:
    inputs = make_layer_inputs(12, [12], [], [])
    layer, x = make_layer(), normal(12, HIDDEN, seed=10)
    layer64, inputs64 = exact(layer, inputs)
    for tensor in layer.tensors():
        if tensor is not None:
            tensor.main_grad = torch.ones_like(tensor)  # type: ignore[attr-defined]
    train_layer(x, layer, inputs).sum().backward()
    reference_train_layer(x.double(), layer64, inputs64).sum().backward()
    for tensor, reference in zip(layer.tensors(), layer64.tensors(), strict=True):
        if tensor is not None and reference is not None:
            assert tensor.grad is None and reference.grad is not None
            assert_equal(tensor.main_grad, 1 + reference.grad)  # type: ignore[attr-defined]


def test_frozen_parameters_get_no_gradient() -> None:
    layer, x = make_layer(), normal(6, HIDDEN, seed=10).requires_grad_()
    for tensor in (layer.qkv, layer.mlp_norm, layer.down):
        tensor.requires_grad_(False)
    train_layer(x, layer, make_layer_inputs(6, [6], [], [])).sum().backward()
    frozen = [name for name, tensor in vars(layer).items() if tensor is not None and tensor.grad is None]
    assert frozen == ["qkv", "mlp_norm", "down"]
    assert x.grad is not None


def test_what_the_kernel_lacks_is_computed_by_the_reference() -> None:
    inputs = make_layer_inputs(6, [6], [], [])
    layer, inputs64 = exact(make_layer(), inputs)
    x = normal(6, HIDDEN, seed=10).double()
    out = train_layer(x, layer, inputs64)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, reference_train_layer(x, layer, inputs64))
    assert_equal(train_layer(x.float(), make_layer(), inputs), out)


def test_second_backward_pass_is_refused() -> None:
    x = normal(6, HIDDEN, seed=10).requires_grad_()
    out = train_layer(x, make_layer(), make_layer_inputs(6, [6], [], [])).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can run once"):
        out.backward()


def test_it_is_known_what_the_kernel_lacks() -> None:
    layer, inputs, x = make_layer(), make_layer_inputs(6, [6], [], []), normal(6, HIDDEN, seed=10)
    assert has_train_layer(x, layer, inputs)
    assert not has_train_layer(x.bfloat16(), layer, inputs)
    assert not has_train_layer(x[:0], layer, inputs)
    assert not has_train_layer(x, dataclasses.replace(layer, down=layer.down.detach().t().contiguous().t()), inputs)
    narrow = dataclasses.replace(inputs, cos=inputs.cos[:, :8].contiguous(), sin=inputs.sin[:, :8].contiguous())
    assert not has_train_layer(x, layer, narrow)


def test_bad_arguments_are_refused() -> None:
    layer, inputs, x = make_layer(), make_layer_inputs(6, [6], [], []), normal(6, HIDDEN, seed=10)
    sequences = inputs.sequences
    for match, change in {
        r"input_norm must be torch.float32 \[40\] on cpu, got torch.float32 \[3\]": {"input_norm": torch.ones(3)},
        "qkv must be": {"qkv": torch.ones(32, HIDDEN)},
        "needed together": {"k_norm": None},
    }.items():
        with pytest.raises(ValueError, match=match):
            train_layer(x, dataclasses.replace(layer, **change), inputs)
    for match, change in {
        r"cos must be torch.float32 \[6, \*\]": {"cos": inputs.cos[:5], "sin": inputs.sin[:5]},
        "a row for each of the 7 tokens": {"sequences": dataclasses.replace(sequences, num_tokens=7)},
        "must give each of 5 tokens to one sequence": {"sequences": dataclasses.replace(sequences, num_tokens=5)},
        "sin must be": {"sin": inputs.sin[:, :8]},
        "starts must be int32": {"sequences": dataclasses.replace(sequences, starts=sequences.starts.long())},
    }.items():
        with pytest.raises(ValueError, match=match):
            train_layer(x, layer, dataclasses.replace(inputs, **change))


def test_sequences_side_by_side_in_memory() -> None:
    length, num_sequences = 7, 3
    inputs = make_layer_inputs(length * num_sequences, [length] * num_sequences, [], [])
    side_by_side = dataclasses.replace(inputs.sequences, starts=torch.arange(num_sequences).int(), step=num_sequences)
    layer = make_layer()
    x = normal(num_sequences, length, HIDDEN, seed=10)
    one_after_another = train_layer(x.flatten(0, 1), layer, inputs).view(x.shape)
    places = torch.arange(num_sequences * length).view(num_sequences, length).t().flatten()
    padded = dataclasses.replace(
        inputs, sequences=side_by_side, cos=inputs.cos[places].contiguous(), sin=inputs.sin[places].contiguous()
    )
    out = train_layer(x.transpose(0, 1).contiguous(), layer, padded).transpose(0, 1)
    torch.testing.assert_close(out, one_after_another, rtol=1e-6, atol=1e-6)


def test_buffer_of_another_type_is_left_to_megatron() -> None:
    layer, inputs, x = make_layer(), make_layer_inputs(6, [6], [], []), normal(6, HIDDEN, seed=10)
    layer.down.main_grad = torch.zeros_like(layer.down, dtype=torch.float64)  # type: ignore[attr-defined]
    train_layer(x, layer, inputs).sum().backward()
    assert layer.down.grad is not None and layer.down.grad.count_nonzero() > 0
    assert layer.down.main_grad.count_nonzero() == 0  # type: ignore[attr-defined]
