"""A dense decoder layer for training as one operation: fp32, on the CPU, on one tensor rank, up to a size of the MLP.

It runs the kernels of `layer_ops`, `linear`, `self_attention` and `gated_mlp` one after the other without coming back
to Python in between. Each of them sweeps the caches, and the interpreter and PyTorch would have to fetch their code and
data from memory again twenty times a layer.

Shapes: T tokens; H hidden size; F of the MLP; n query heads and g key/value heads of size d.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from xrl.kernels.arguments import (
    address,
    check_count,
    check_floats,
    check_instance,
    check_no_gradient,
    check_number,
    check_tensor,
)
from xrl.kernels.layers.gated_mlp import is_fused, reference_gated_mlp
from xrl.kernels.layers.layer_ops import reference_rms_norm
from xrl.kernels.layers.linear import gradient_destination
from xrl.kernels.layers.self_attention import (
    HEAD_DIM_MULTIPLE,
    HeadSettings,
    PackedSequences,
    check_head_norms,
    reference_self_attention,
)
from xrl.kernels.native import native_module
from xrl.kernels.threads import num_threads


@dataclass(frozen=True, kw_only=True)
class LayerParameters:
    """The parameters of a decoder layer, in the order of the kernel's arguments."""

    input_norm: Tensor  # [H]
    qkv: Tensor  # [(n + 2 g) * d, H] as megatron-core lays it out
    qkv_bias: Tensor | None  # [(n + 2 g) * d]
    q_norm: Tensor | None  # [d]
    k_norm: Tensor | None  # [d]
    attention_out: Tensor  # [H, n * d]
    mlp_norm: Tensor  # [H]
    gate_up: Tensor  # [2 F, H] the gate's rows before the up projection's
    down: Tensor  # [H, F]

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All parameters in their order, without a copy."""
        return tuple(vars(self).values())


_NAMES = tuple(field.name for field in fields(LayerParameters))


@dataclass(frozen=True, kw_only=True)
class LayerInputs:
    """What a layer computes with, beside its parameters and the hidden states."""

    sequences: PackedSequences
    cos: Tensor  # [T, d]
    sin: Tensor  # [T, d]
    num_kv_heads: int
    eps: float  # of every norm
    scale: float  # of the scores


def has_train_layer(x: Tensor, parameters: LayerParameters, inputs: LayerInputs) -> bool:
    """Whether there is a kernel for such a layer; `reference_train_layer`, which serves all others, is slow."""
    tensors = [x, inputs.cos, inputs.sin, *(tensor for tensor in parameters.tensors() if tensor is not None)]
    if any(tensor.dtype != torch.float32 or not tensor.is_contiguous() for tensor in tensors):
        return False
    head_dim = inputs.cos.shape[-1]
    return x.numel() > 0 and head_dim % HEAD_DIM_MULTIPLE == 0 and is_fused(x, parameters.gate_up, parameters.down)


def train_layer(x: Tensor, parameters: LayerParameters, inputs: LayerInputs) -> Tensor:
    """Apply the layer to x [..., H]; differentiable in x and all parameters, once.

    Raises:
        ValueError: shapes, types or devices that do not fit together, or sequences that do not share out the tokens.
        TypeError: an argument is of another kind.
    """
    _check(x, parameters, inputs)
    if not has_train_layer(x, parameters, inputs):
        inputs.sequences.check_values()
        return reference_train_layer(x, parameters, inputs)
    out: Tensor = _TrainLayer.apply(x, inputs, *parameters.tensors())
    return out


def reference_train_layer(x: Tensor, parameters: LayerParameters, inputs: LayerInputs) -> Tensor:
    """The specification of `train_layer`."""
    p = parameters
    heads = HeadSettings(
        cos=inputs.cos, sin=inputs.sin, q_weight=p.q_norm, k_weight=p.k_norm, eps=inputs.eps, scale=inputs.scale
    )
    mixed = F.linear(reference_rms_norm(x, p.input_norm, inputs.eps), p.qkv, p.qkv_bias).flatten(0, -2)
    attended = reference_self_attention(mixed, inputs.sequences, heads, num_kv_heads=inputs.num_kv_heads)
    x = x + F.linear(attended, p.attention_out).view(x.shape)
    return reference_gated_mlp(reference_rms_norm(x, p.mlp_norm, inputs.eps), p.gate_up, p.down) + x


class _TrainLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inputs: LayerInputs, *parameters: Tensor | None) -> Tensor:
        module: Any = native_module()
        layer = _layer(x, inputs, *parameters)
        ctx.save_for_backward(x, *parameters)
        ctx.inputs = inputs
        # Not saved: autograd would refuse that the backward pass overwrites it.
        ctx.kept = x.new_empty(module.train_layer_kept(*layer[:2]))
        out = torch.empty_like(x)
        module.train_layer_forward(
            layer=layer, x=address(x), kept=address(ctx.kept), out=address(out), num_threads=num_threads()
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None
        if kept is None:
            raise RuntimeError("train_layer: the backward pass can run once: it overwrites what the forward pass kept")
        grad, grad_x = grads[0].contiguous(), torch.empty_like(x)
        destinations = [
            gradient_destination(parameter) if needed else None
            for parameter, needed in zip(parameters, ctx.needs_input_grad[2:], strict=True)
        ]
        native_module().train_layer_backward(  # type: ignore[union-attr]
            layer=_layer(x, ctx.inputs, *parameters),
            x=address(x),
            kept=address(kept),
            grad=address(grad),
            gradients=[0 if each is None else address(each.buffer) for each in destinations],
            grad_x=address(grad_x),
            num_threads=num_threads(),
        )
        return grad_x, None, *(None if each is None else each.result for each in destinations)


def _layer(x: Tensor, inputs: LayerInputs, *parameters: Tensor | None) -> tuple[Any, ...]:
    """The layer as the kernel takes it."""
    given = LayerParameters(**dict(zip(_NAMES, parameters, strict=True)))  # type: ignore[arg-type]
    sequences, hidden, head_dim = inputs.sequences, x.shape[-1], inputs.cos.shape[-1]
    queries_per_key = given.attention_out.shape[1] // (inputs.num_kv_heads * head_dim)
    return (
        (x.numel() // hidden, hidden, given.down.shape[1], inputs.eps, inputs.scale),
        (sequences.num_tokens, inputs.num_kv_heads, queries_per_key, head_dim),
        [address(tensor) for tensor in parameters],
        sequences.addresses(),
        address(inputs.cos),
        address(inputs.sin),
    )


def _check(x: Tensor, parameters: LayerParameters, inputs: LayerInputs) -> None:
    check_floats("x", x)
    check_instance("parameters", parameters, LayerParameters)
    check_instance("inputs", inputs, LayerInputs)
    hidden, sequences = x.shape[-1], inputs.sequences
    if hidden < 1:
        raise ValueError(f"x must be [..., H] with H >= 1, got {list(x.shape)}")
    check_count("num_kv_heads", inputs.num_kv_heads)
    num_rows = x.numel() // hidden
    check_tensor("cos", inputs.cos, (num_rows, None), like=x)
    check_tensor("sin", inputs.sin, inputs.cos.shape, like=x)
    head_dim = inputs.cos.shape[1]
    check_tensor("attention_out", parameters.attention_out, (hidden, None), like=x)
    check_tensor("down", parameters.down, (hidden, None), like=x)
    queries, ffn = parameters.attention_out.shape[1], parameters.down.shape[1]
    kv_width = inputs.num_kv_heads * head_dim
    if head_dim < 2 or head_dim % 2 or queries < kv_width or queries % kv_width:
        raise ValueError(
            f"{queries} query columns are not whole heads of {head_dim} for {inputs.num_kv_heads} KV heads"
        )
    qkv_width = queries + 2 * kv_width
    sizes: dict[str, tuple[int, ...]] = {
        "input_norm": (hidden,),
        "qkv": (qkv_width, hidden),
        "mlp_norm": (hidden,),
        "gate_up": (2 * ffn, hidden),
    }
    for name, size in sizes.items():
        check_tensor(name, getattr(parameters, name), size, like=x)
    if parameters.qkv_bias is not None:
        check_tensor("qkv_bias", parameters.qkv_bias, (qkv_width,), like=x)
    check_head_norms(parameters.q_norm, parameters.k_norm, (head_dim,), like=x, names=("q_norm", "k_norm"))
    check_number("eps", inputs.eps, lowest=0.0)
    check_number("scale", inputs.scale)
    check_no_gradient("train_layer", cos=inputs.cos, sin=inputs.sin)
    check_instance("sequences", sequences, PackedSequences)
    sequences.check(num_rows)
