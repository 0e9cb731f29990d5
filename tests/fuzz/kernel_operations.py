"""Each public operation of xrl.kernels with arguments that fit, and how far each may be changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from tests.kernels.head.loss_calls import call_loss
from xrl.algorithms.loss_settings import TokenLossSettings
from xrl.kernels.decode import rms_norm, rope_cache, sample_tokens
from xrl.kernels.decode.decode_attention import PagedContext, decode_attention, reference_decode_attention
from xrl.kernels.decode.decode_layers import DecodeLayer, RopeTables, decode_layers, reference_decode_layers
from xrl.kernels.decode.packed_linear import PackedLinear, PackedSwiGLU
from xrl.kernels.decode.prefill_attention import prefill_attention, reference_prefill_attention
from xrl.kernels.head.grpo_loss import grpo_token_loss, reference_grpo_token_loss
from xrl.kernels.head.linear_grpo import linear_grpo_loss, reference_linear_grpo_loss
from xrl.kernels.head.linear_logprob import linear_logprob, reference_linear_logprob
from xrl.kernels.head.logprob import reference_logprob, vocab_parallel_logprob
from xrl.kernels.layers import layer_ops
from xrl.kernels.layers.gated_mlp import gated_mlp, reference_gated_mlp
from xrl.kernels.layers.linear import linear
from xrl.kernels.layers.self_attention import HeadSettings, PackedSequences, reference_self_attention, self_attention
from xrl.kernels.layers.train_layer import LayerInputs, LayerParameters, reference_train_layer, train_layer
from xrl.kernels.matmul import matmul, matmul_into

Arguments = dict[str, Any]
FLOATS = (torch.float32, torch.float64)  # numbers a row may be either
IDS = (torch.int32, torch.int64)


@dataclass(frozen=True, kw_only=True)
class Operation:
    """Arguments go by name, those of dataclasses too."""

    call: Callable[..., object]
    reference: Callable[..., object]
    arguments: Callable[[], Arguments]  # that fit; tensors and numbers
    # For each tensor a letter a dimension. b: bound, another length is wrong; l: at least so long; f: any.
    shapes: Mapping[str, str]
    dtypes: Mapping[str, tuple[torch.dtype, ...]] = field(default_factory=dict)  # that do as well
    indices: tuple[str, ...] = ()  # whose values must be small; -1 is wrong too, but for:
    may_be_minus_1: tuple[str, ...] = ()
    may_be_none: tuple[str, ...] = ()
    of_any_rank: tuple[str, ...] = ()
    differentiable: tuple[str, ...] = ()


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape)


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _some(kind: type, arguments: Arguments) -> Any:
    """A dataclass from those of the arguments that are its fields, which are taken out."""
    return kind(**{each.name: arguments.pop(each.name) for each in fields(kind) if each.name in arguments})


# --- for inference


def _paged() -> Arguments:
    return {
        "group_starts": int32(0, 2, 3),
        "prompt_blocks": torch.tensor([[0, 1], [2, 0]], dtype=torch.int32),
        "prompt_lengths": int32(7, 4),
        "row_blocks": torch.tensor([[3], [4], [5]], dtype=torch.int32),
        "row_lengths": int32(2, 4, 1),
    }


PAGED_SHAPES = {
    "group_starts": "b",
    "prompt_blocks": "bl",
    "prompt_lengths": "b",
    "row_blocks": "bl",
    "row_lengths": "b",
}
PAGED_INDICES = ("group_starts", "prompt_blocks", "prompt_lengths", "row_blocks", "row_lengths")


def _decode_attention() -> Arguments:
    return {"query": normal(3, 4, 16), "key_cache": normal(6, 2, 4, 16), "value_cache": normal(6, 2, 4, 16), **_paged()}


def _with_context(compute: Callable[..., object]) -> Callable[..., object]:
    def call(**arguments: Any) -> object:
        context = _some(PagedContext, arguments)
        return compute(**arguments, context=context)

    return call


def _rope_cache() -> Arguments:
    return {
        "qkv": normal(3, 8, 16),
        "cos": normal(9, 8),
        "sin": normal(9, 8),
        "positions": int32(0, 5, 8),
        "q_norm": normal(16),
        "k_norm": normal(16),
        "eps": 1e-6,
        "key_cache": normal(2, 2, 4, 16),
        "value_cache": normal(2, 2, 4, 16),
        "slots": int32(0, 7, -1),
    }


def _in_place(compute: Callable[..., object], *names: str) -> Callable[..., object]:
    def call(**arguments: Any) -> object:
        compute(**arguments)
        return [arguments[name] for name in names]

    return call


def _decode_layers() -> Arguments:
    return {
        "x": normal(3, 32),
        "input_norm": normal(32),
        "q_norm": normal(16),
        "k_norm": normal(16),
        "mlp_norm": normal(32),
        "keys": normal(6, 2, 4, 16),
        "values": normal(6, 2, 4, 16),
        "positions": int32(0, 5, 8),
        "cos": normal(9, 8),
        "sin": normal(9, 8),
        "slots": int32(13, 19, 20),
        "eps": 1e-6,
        **_paged(),
    }


def _products() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * shape[-1] ** -0.5

    return {
        "qkv": PackedLinear(weight(128, 32)),
        "attention_out": PackedLinear(weight(32, 64)),
        "gate_up": PackedSwiGLU(weight(96, 32)),
        "down": PackedLinear(weight(32, 48)),
    }


def _with_layers(compute: Callable[..., object]) -> Callable[..., object]:
    def call(**arguments: Any) -> object:
        names = ("input_norm", "q_norm", "k_norm", "mlp_norm", "keys", "values")
        layer = DecodeLayer(**{name: arguments.pop(name) for name in names}, **_products())
        context, rope = _some(PagedContext, arguments), _some(RopeTables, arguments)
        out = compute(arguments.pop("x"), [layer], context, rope, **arguments)
        return [out, layer.keys, layer.values]

    return call


def _reference_sample(**arguments: Any) -> object:
    return sample_tokens.reference_sample_tokens(**arguments)


def _packed_linear(*, weight: Tensor, bias: Tensor | None, x: Tensor, other: Tensor) -> object:
    packed = PackedLinear(weight, bias)
    return [packed(x), packed.plus(x, other)]


def _plain_linear(*, weight: Tensor, bias: Tensor | None, x: Tensor, other: Tensor) -> object:
    out = torch.nn.functional.linear(x, weight, bias)
    return [out, out + other]


def _packed_swiglu(*, weight: Tensor, bias: Tensor | None, x: Tensor) -> object:
    return PackedSwiGLU(weight, bias)(x)


def _plain_swiglu(*, weight: Tensor, bias: Tensor | None, x: Tensor) -> object:
    return layer_ops.reference_swiglu(torch.nn.functional.linear(x, weight, bias))


def _plain_matmul_into(*, a: Tensor, b: Tensor, out: Tensor, addend: Tensor | None) -> object:
    out.copy_(a @ b if addend is None else a @ b + addend)
    return [out]


def _plain_swiglu_into(*, x: Tensor, out: Tensor) -> object:
    out.copy_(layer_ops.reference_swiglu(x))
    return [out]


def _plain_swiglu_gradient(*, x: Tensor, grad: Tensor, grad_x: Tensor, out: Tensor | None) -> object:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        layer_ops.reference_swiglu(leaf).backward(grad)
    assert leaf.grad is not None
    grad_x.copy_(leaf.grad)
    return [grad_x]


# --- for training


def _self_attention() -> Arguments:
    return {
        "mixed": normal(11, 128),
        "starts": int32(0, 5, 8),
        "lengths": int32(5, 3, 3),
        "parents": int32(-1, 0, 0),
        "num_tokens": 11,
        "step": 1,
        "cos": normal(11, 16),
        "sin": normal(11, 16),
        "q_weight": normal(16),
        "k_weight": normal(16),
        "eps": 1e-6,
        "scale": 0.25,
        "num_kv_heads": 2,
    }


def _with_head_settings(compute: Callable[..., object]) -> Callable[..., object]:
    def call(**arguments: Any) -> object:
        sequences, settings = _some(PackedSequences, arguments), _some(HeadSettings, arguments)
        return compute(arguments["mixed"], sequences, settings, num_kv_heads=arguments["num_kv_heads"])

    return call


def _train_layer() -> Arguments:
    hidden, ffn, queries, kv = 32, 48, 64, 32
    sizes = {
        "input_norm": (hidden,),
        "qkv": (queries + 2 * kv, hidden),
        "qkv_bias": (queries + 2 * kv,),
        "q_norm": (16,),
        "k_norm": (16,),
        "attention_out": (hidden, queries),
        "mlp_norm": (hidden,),
        "gate_up": (2 * ffn, hidden),
        "down": (hidden, ffn),
    }
    rest = {name: value for name, value in _self_attention().items() if name not in ("mixed", "q_weight", "k_weight")}
    return {"x": normal(11, hidden), **{name: normal(*size) * size[-1] ** -0.5 for name, size in sizes.items()}, **rest}


def _with_layer_inputs(compute: Callable[..., object]) -> Callable[..., object]:
    def call(**arguments: Any) -> object:
        parameters = _some(LayerParameters, arguments)
        arguments["sequences"] = _some(PackedSequences, arguments)
        inputs = _some(LayerInputs, arguments)
        return compute(arguments["x"], parameters, inputs)

    return call


# --- log-probs and losses

SETTINGS = TokenLossSettings(kl_coef=0.1)


def _token_rows() -> Arguments:
    return {
        "token_ids": torch.tensor([1, 49, 0]),
        "advantages": normal(3),
        "shares": torch.ones(3),
        "old_logprobs": -normal(3).abs(),
        "reference_logprobs": -normal(3).abs(),
        "temperature": 0.9,
    }


ROW_SHAPES = {"token_ids": "b", "advantages": "b", "shares": "b", "old_logprobs": "b", "reference_logprobs": "b"}
ROW_DTYPES = {
    "token_ids": IDS,
    "advantages": FLOATS,
    "old_logprobs": FLOATS,
    "reference_logprobs": FLOATS,
    # Made floating point.
    "shares": (*FLOATS, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.bool),
}
LOGIT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _loss(**arguments: Any) -> object:
    return call_loss(grpo_token_loss, **arguments, settings=SETTINGS, in_place=False).token_loss


def _plain_loss(**arguments: Any) -> object:
    return call_loss(reference_grpo_token_loss, **arguments, settings=SETTINGS)


def _linear_loss(**arguments: Any) -> object:
    return call_loss(linear_grpo_loss, **arguments, settings=SETTINGS).loss


def _plain_linear_loss(**arguments: Any) -> object:
    return call_loss(reference_linear_grpo_loss, **arguments, settings=SETTINGS)


OPERATIONS: Mapping[str, Operation] = MappingProxyType(
    {
        "rms_norm": Operation(
            call=rms_norm.rms_norm,
            reference=rms_norm.reference_rms_norm,
            arguments=lambda: {"x": normal(4, 33), "weight": normal(33), "eps": 1e-6},
            shapes={"x": "fb", "weight": "b"},
        ),
        "rope_cache": Operation(
            call=_in_place(rope_cache.rope_cache, "qkv", "key_cache", "value_cache"),
            reference=_in_place(rope_cache.reference_rope_cache, "qkv", "key_cache", "value_cache"),
            arguments=_rope_cache,
            shapes={
                "qkv": "bfb",
                "cos": "bb",
                "sin": "bb",
                "positions": "b",
                "q_norm": "b",
                "k_norm": "b",
                "key_cache": "bbbb",
                "value_cache": "bbbb",
                "slots": "b",
            },
            indices=("positions", "slots"),
            may_be_minus_1=("slots",),
            may_be_none=("q_norm", "k_norm"),
        ),
        "decode_attention": Operation(
            call=_with_context(decode_attention),
            reference=_with_context(reference_decode_attention),
            arguments=_decode_attention,
            shapes={"query": "bfb", "key_cache": "bbbb", "value_cache": "bbbb", **PAGED_SHAPES},
            indices=PAGED_INDICES,
        ),
        "decode_layers": Operation(
            call=_with_layers(decode_layers),
            reference=_with_layers(reference_decode_layers),
            arguments=_decode_layers,
            shapes={
                "x": "bb",
                "input_norm": "b",
                "q_norm": "b",
                "k_norm": "b",
                "mlp_norm": "b",
                "keys": "bbbb",
                "values": "bbbb",
                "positions": "b",
                "cos": "bb",
                "sin": "bb",
                "slots": "b",
                **PAGED_SHAPES,
            },
            indices=("positions", "slots", *PAGED_INDICES),
            may_be_minus_1=("slots",),
            may_be_none=("q_norm", "k_norm"),
        ),
        "prefill_attention": Operation(
            call=prefill_attention,
            reference=reference_prefill_attention,
            arguments=lambda: {"qkv": normal(9, 8, 16), "lengths": [5, 4], "num_heads": 4},
            shapes={"qkv": "lff"},
        ),
        "sample_tokens": Operation(
            call=sample_tokens.sample_tokens,
            reference=_reference_sample,
            arguments=lambda: {
                "logits": normal(3, 50),
                "temperatures": torch.tensor([0.0, 0.7, 1.0]),
                "uniforms": torch.rand(3, dtype=torch.float64),
            },
            shapes={"logits": "bf", "temperatures": "b", "uniforms": "b"},
        ),
        "PackedLinear": Operation(
            call=_packed_linear,
            reference=_plain_linear,
            arguments=lambda: {
                "weight": normal(24, 40),
                "bias": normal(24),
                "x": normal(5, 40),
                "other": normal(5, 24),
            },
            shapes={"weight": "bb", "bias": "b", "x": "bb", "other": "bb"},
            may_be_none=("bias",),
        ),
        "PackedSwiGLU": Operation(
            call=_packed_swiglu,
            reference=_plain_swiglu,
            arguments=lambda: {"weight": normal(24, 40), "bias": normal(24), "x": normal(5, 40)},
            shapes={"weight": "bb", "bias": "b", "x": "fb"},
            may_be_none=("bias",),
        ),
        "matmul": Operation(
            call=matmul,
            reference=lambda a, b: a @ b,
            arguments=lambda: {"a": normal(5, 40), "b": normal(40, 24)},
            shapes={"a": "fb", "b": "bf"},
        ),
        "matmul_into": Operation(
            call=_in_place(matmul_into, "out"),
            reference=_plain_matmul_into,
            arguments=lambda: {"a": normal(5, 40), "b": normal(40, 24), "out": normal(5, 24), "addend": normal(5, 24)},
            shapes={"a": "bb", "b": "bb", "out": "bb", "addend": "bb"},
            may_be_none=("addend",),
        ),
        "training rms_norm": Operation(
            call=layer_ops.rms_norm,
            reference=layer_ops.reference_rms_norm,
            arguments=lambda: {"x": normal(4, 3, 33), "weight": normal(33), "eps": 1e-6},
            shapes={"x": "ffb", "weight": "b"},
            of_any_rank=("x",),
            differentiable=("x", "weight"),
        ),
        "swiglu": Operation(
            call=layer_ops.swiglu,
            reference=layer_ops.reference_swiglu,
            arguments=lambda: {"x": normal(4, 34)},
            shapes={"x": "ff"},
            of_any_rank=("x",),
            differentiable=("x",),
        ),
        "swiglu_into": Operation(
            call=_in_place(layer_ops.swiglu_into, "out"),
            reference=_plain_swiglu_into,
            arguments=lambda: {"x": normal(4, 34), "out": normal(4, 17)},
            shapes={"x": "bb", "out": "bb"},
        ),
        "swiglu_gradient_into": Operation(
            call=_in_place(layer_ops.swiglu_gradient_into, "grad_x"),
            reference=_plain_swiglu_gradient,
            arguments=lambda: {
                "x": normal(4, 34),
                "grad": normal(4, 17),
                "grad_x": normal(4, 34),
                "out": normal(4, 17),
            },
            shapes={"x": "bb", "grad": "bb", "grad_x": "bb", "out": "bb"},
            may_be_none=("out",),
        ),
        "rotary": Operation(
            call=layer_ops.rotary,
            reference=layer_ops.reference_rotary,
            arguments=lambda: {"x": normal(5, 3, 16), "cos": normal(5, 16), "sin": normal(5, 16)},
            shapes={"x": "bfb", "cos": "bb", "sin": "bb"},
            differentiable=("x",),
        ),
        "linear": Operation(
            call=linear,
            reference=torch.nn.functional.linear,
            arguments=lambda: {"x": normal(4, 3, 40), "weight": normal(24, 40)},
            shapes={"x": "ffb", "weight": "fb"},
            of_any_rank=("x",),
            differentiable=("x", "weight"),
        ),
        "gated_mlp": Operation(
            call=gated_mlp,
            reference=reference_gated_mlp,
            arguments=lambda: {"x": normal(5, 16), "gate_up": normal(48, 16), "down": normal(16, 24)},
            shapes={"x": "fb", "gate_up": "bb", "down": "bb"},
            of_any_rank=("x",),
            differentiable=("x", "gate_up", "down"),
        ),
        "self_attention": Operation(
            call=_with_head_settings(self_attention),
            reference=_with_head_settings(reference_self_attention),
            arguments=_self_attention,
            shapes={
                "mixed": "bf",
                "starts": "b",
                "lengths": "b",
                "parents": "b",
                "cos": "bb",
                "sin": "bb",
                "q_weight": "b",
                "k_weight": "b",
            },
            indices=("starts", "lengths", "parents"),
            may_be_minus_1=("parents",),
            differentiable=("mixed", "q_weight", "k_weight"),
        ),
        "train_layer": Operation(
            call=_with_layer_inputs(train_layer),
            reference=_with_layer_inputs(reference_train_layer),
            arguments=_train_layer,
            shapes={
                "x": "bb",
                "input_norm": "b",
                "qkv": "bb",
                "qkv_bias": "b",
                "q_norm": "b",
                "k_norm": "b",
                "attention_out": "bb",
                "mlp_norm": "b",
                "gate_up": "bb",
                "down": "bb",
                "starts": "b",
                "lengths": "b",
                "parents": "b",
                "cos": "bb",
                "sin": "bb",
            },
            indices=("starts", "lengths", "parents"),
            may_be_minus_1=("parents",),
            may_be_none=("qkv_bias",),
            of_any_rank=("x",),
            differentiable=("x", *(each.name for each in fields(LayerParameters))),
        ),
        "vocab_parallel_logprob": Operation(
            call=lambda **arguments: vocab_parallel_logprob(**arguments).logprob,
            reference=lambda **arguments: reference_logprob(**arguments).logprob,
            arguments=lambda: {"logits": normal(3, 50), "token_ids": torch.tensor([1, 49, 0]), "temperature": 0.9},
            shapes={"logits": "bl", "token_ids": "b"},
            dtypes={"logits": LOGIT_DTYPES, "token_ids": IDS},
            indices=("token_ids",),
            differentiable=("logits",),
        ),
        "grpo_token_loss": Operation(
            call=_loss,
            reference=_plain_loss,
            arguments=lambda: {"logits": normal(3, 50), **_token_rows()},
            shapes={"logits": "bl", **ROW_SHAPES},
            dtypes={"logits": LOGIT_DTYPES, **ROW_DTYPES},
            indices=("token_ids",),
            may_be_none=("shares", "old_logprobs"),
            differentiable=("logits",),
        ),
        "linear_logprob": Operation(
            call=lambda **arguments: linear_logprob(**arguments).logprob,
            reference=lambda **arguments: reference_linear_logprob(**arguments).logprob,
            arguments=lambda: {
                "hidden": normal(4, 16),
                "weight": normal(50, 16),
                "token_ids": torch.tensor([1, 49, 0]),
                "rows": torch.tensor([3, 0, 1]),
                "temperature": 0.9,
            },
            shapes={"hidden": "lb", "weight": "lb", "token_ids": "b", "rows": "b"},
            dtypes={"token_ids": IDS, "rows": IDS},
            indices=("token_ids", "rows"),
            differentiable=("hidden", "weight"),
        ),
        "linear_grpo_loss": Operation(
            call=_linear_loss,
            reference=_plain_linear_loss,
            arguments=lambda: {
                "hidden": normal(4, 16) / math.sqrt(16),
                "weight": normal(50, 16),
                "rows": torch.tensor([3, 0, 1]),
                **_token_rows(),
            },
            shapes={"hidden": "lb", "weight": "lb", "rows": "b", **ROW_SHAPES},
            dtypes={"rows": IDS, **ROW_DTYPES},
            indices=("token_ids", "rows"),
            may_be_none=("shares", "old_logprobs"),
            differentiable=("hidden", "weight"),
        ),
    }
)
