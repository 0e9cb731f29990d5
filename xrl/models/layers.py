"""The decoder layers of a family as megatron-core's specs: our own modules, or transformer-engine's."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import LayerNormImpl, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from xrl.kernels.layers.choice import LayerKind, why_not_dense
from xrl.models.attention import PackedAttention
from xrl.models.choice import layer_kind
from xrl.models.decoder_layer import DecoderLayer
from xrl.models.latent_attention import LatentAttention
from xrl.models.linear import ColumnParallelLinear, RowParallelLinear
from xrl.models.mlp import GatedMLP, SwiGLU
from xrl.models.norm import RMSNorm
from xrl.models.self_attention import SelfAttention
from xrl.models.shape import ModelShape

# How megatron-core says of what a module is built: a ModuleSpec, or in later versions a partial call that builds it.
Spec: TypeAlias = "ModuleSpec | functools.partial[Any]"


def local_layers(shape: ModelShape, layers: Sequence[int]) -> TransformerBlockSubmodules:
    """megatron-core's parallel linear layers around our own norm and attention: runs on any device.

    Args:
        layers: numbers, from 0, of the layers of this stage.
    """
    specs = [_local_layer(shape, _num_experts(shape, layer), layer_kind(shape, layer)) for layer in layers]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm)


def te_layers(shape: ModelShape, layers: Sequence[int]) -> TransformerBlockSubmodules:
    """transformer-engine's layers, for CUDA; never of latent attention."""
    specs = [_te_layer(shape, _num_experts(shape, layer)) for layer in layers]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=LayerNormImpl)


def _num_experts(shape: ModelShape, layer: int) -> int | None:
    return shape.experts.num_experts if shape.experts is not None and shape.has_experts(layer) else None


def _local_layer(shape: ModelShape, num_experts: int | None, kind: LayerKind) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(
        num_experts=num_experts,
        qk_layernorm=shape.qk_norm or shape.latent is not None,
        multi_latent_attention=shape.latent is not None,
        normalization="RMSNorm",
    )
    if not why_not_dense(kind):
        layer.module = DecoderLayer
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    _use_our_attention(layer.submodules.self_attention, shape)
    if num_experts is None:
        layer.submodules.mlp = _use_our_mlp(layer.submodules.mlp, shape)
    else:
        _use_our_experts(layer.submodules.mlp)
    return layer


def _use_our_attention(spec: ModuleSpec, shape: ModelShape) -> None:
    parts = spec.submodules
    parts.core_attention = PackedAttention
    if shape.latent is not None:
        spec.module = LatentAttention
        parts.q_layernorm = parts.kv_layernorm = RMSNorm
    else:
        spec.module = _with_bias(SelfAttention) if shape.out_bias else SelfAttention
        if shape.qk_norm:
            parts.q_layernorm = parts.k_layernorm = RMSNorm
    if torch.cuda.is_available():
        return
    parts.linear_proj = RowParallelLinear
    if shape.latent is None:
        parts.linear_qkv = ColumnParallelLinear
    else:
        # Those down to the latents stay megatron-core's own, which it insists on.
        parts.linear_q_proj = parts.linear_q_up_proj = parts.linear_kv_up_proj = ColumnParallelLinear


def _use_our_mlp(spec: Spec, shape: ModelShape) -> Spec:
    _use_our_linear(_parts(spec))
    if shape.mlp_bias:
        return _of_module(spec, _with_bias(MLP))
    return spec if torch.cuda.is_available() else _of_module(spec, GatedMLP)


def _use_our_experts(spec: Spec) -> None:
    parts = _parts(spec)
    _use_our_linear(_parts(parts.experts))
    _use_our_linear(_parts(parts.shared_experts))


def _parts(spec: Spec) -> Any:
    return spec.submodules if isinstance(spec, ModuleSpec) else spec.keywords["submodules"]


def _of_module(spec: Spec, module: type[MLP]) -> Spec:
    """The same with another class of MLP."""
    if isinstance(spec, ModuleSpec):
        return ModuleSpec(module=module, params=spec.params, submodules=spec.submodules)
    return functools.partial(module.as_mlp_submodule, *spec.args, **spec.keywords)


def _use_our_linear(parts: MLPSubmodules) -> None:
    parts.activation_func = SwiGLU
    if not torch.cuda.is_available():
        parts.linear_fc1, parts.linear_fc2 = ColumnParallelLinear, RowParallelLinear


def _te_layer(shape: ModelShape, num_experts: int | None) -> ModuleSpec:
    layer = get_gpt_layer_with_transformer_engine_spec(
        num_experts=num_experts,
        moe_grouped_gemm=num_experts is not None,
        qk_layernorm=shape.qk_norm,
    )
    attention, mlp = layer.submodules.self_attention, layer.submodules.mlp
    if shape.out_bias:
        attention.module = _with_bias(attention.module)
    if shape.mlp_bias:
        layer.submodules.mlp = _of_module(mlp, _with_bias(MLP))
    return layer


def _with_bias(module: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """The module with biases in its linear layers: megatron-core has one switch for those of attention and MLP."""

    class WithBias(module):  # type: ignore[valid-type,misc]
        def __init__(self, config: TransformerConfig, *args: object, **kwargs: object) -> None:
            config = copy.copy(config)
            config.add_bias_linear = True
            super().__init__(config, *args, **kwargs)

    WithBias.__name__ = f"{module.__name__}WithBias"
    return WithBias
