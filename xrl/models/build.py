"""A megatron-core GPTModel of a Hugging Face decoder: this rank's part of it, without weights."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from xrl.config import ModelConfig, ParallelConfig
from xrl.models.attention import PackedAttention
from xrl.models.linear import ColumnParallelLinear, RowParallelLinear
from xrl.models.mlp import GatedMLP, SwiGLU
from xrl.models.norm import RMSNorm
from xrl.models.self_attention import SelfAttention
from xrl.models.shape import ModelShape
from xrl.parallel.groups import ParallelGroups


def padded_vocab_size(shape: ModelShape, tensor_size: int) -> int:
    """The vocabulary rounded up so that every tensor rank holds equally many rows."""
    return -(-shape.vocab_size // tensor_size) * tensor_size


def uses_transformer_engine(config: ModelConfig) -> bool:
    """Whether layers are transformer-engine's: asked for, or on CUDA with the package installed."""
    if config.transformer_impl == "auto":
        return torch.cuda.is_available() and _has_transformer_engine()
    return config.transformer_impl == "transformer_engine"


def train_dtype(config: ModelConfig) -> torch.dtype:
    """bf16 on CUDA and fp32 on CPU, unless told otherwise."""
    bf16 = torch.cuda.is_available() if config.bf16 is None else config.bf16
    return torch.bfloat16 if bf16 else torch.float32


def transformer_config(
    shape: ModelShape, model: ModelConfig, parallel: ParallelConfig, *, transformer_engine: bool
) -> TransformerConfig:
    """megatron-core's configuration of the decoder."""
    dtype = train_dtype(model)
    on_cuda = torch.cuda.is_available()
    recompute = {}
    if model.recompute_granularity == "full":
        recompute = {"recompute_method": "uniform", "recompute_num_layers": model.recompute_num_layers}
    with _without_remarks():
        return TransformerConfig(
            num_layers=shape.num_layers,
            hidden_size=shape.hidden_size,
            ffn_hidden_size=shape.ffn_hidden_size,
            num_attention_heads=shape.num_heads,
            num_query_groups=shape.num_kv_heads,
            kv_channels=shape.head_dim,
            normalization="RMSNorm",
            layernorm_epsilon=shape.norm_eps,
            qk_layernorm=shape.qk_norm,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=False,
            add_qkv_bias=shape.qkv_bias,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            attention_softmax_in_fp32=True,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
            sequence_parallel=parallel.sequence_parallel,
            # Packs differ in length: the stages tell each other. megatron-core ties this to a dispatcher, dense or not.
            variable_seq_lengths=True,
            moe_token_dispatcher_type="alltoall",
            # The weights come from a checkpoint; initialising them costs time and CUDA random states for nothing.
            perform_initialization=False,
            use_cpu_initialization=not on_cuda,
            # Despite its name: the activation is a module of the layer spec, here our SwiGLU.
            use_te_activation_func=not transformer_engine,
            bias_activation_fusion=transformer_engine,
            bias_dropout_fusion=on_cuda,
            masked_softmax_fusion=False,
            persist_layer_norm=False,
            gradient_accumulation_fusion=False,
            recompute_granularity=model.recompute_granularity,
            **recompute,
        )


def build_model(
    shape: ModelShape,
    config: TransformerConfig,
    groups: ParallelGroups,
    *,
    transformer_engine: bool,
) -> GPTModel:
    """This rank's stage, uninitialised, on its device.

    With transformer-engine, megatron-core applies rotary positions; otherwise our own attention does.
    """
    make_spec: Callable[..., ModuleSpec | TransformerBlockSubmodules] = (
        _engine_spec if transformer_engine else _local_spec
    )
    with _without_remarks():
        model = GPTModel(
            config=config,
            transformer_layer_spec=make_spec(config, shape),
            vocab_size=padded_vocab_size(shape, groups.layout.tensor_size),
            max_sequence_length=shape.max_positions,
            pre_process=groups.is_first_stage,
            post_process=groups.is_last_stage,
            share_embeddings_and_output_weights=shape.tied_embeddings,
            position_embedding_type="rope" if transformer_engine else "none",
            rotary_base=int(shape.rope_base),
        )
    _mark_tensor_parallel(model)
    return model.to(groups.device)


@contextlib.contextmanager
def _without_remarks() -> Iterator[None]:
    """Keep back what megatron-core says of its own defaults, and of layers that are not its own: nothing to act on."""
    logger = logging.getLogger("megatron.core.transformer.transformer_layer")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _mark_tensor_parallel(model: GPTModel) -> None:
    """Tell the optimizer which weights are shards.

    megatron-core does so while it initialises weights, which we leave out. Unmarked, shards on other ranks would count
    as copies, and the gradient norm would miss them.
    """
    dims = {
        tensor_parallel.ColumnParallelLinear: 0,
        tensor_parallel.VocabParallelEmbedding: 0,
        tensor_parallel.RowParallelLinear: 1,
    }
    for module in model.modules():
        for kind, dim in dims.items():
            weight = module.weight if isinstance(module, kind) else None
            if weight is not None and not getattr(weight, "tensor_model_parallel", False):
                tensor_parallel.set_tensor_model_parallel_attributes(tensor=weight, is_parallel=True, dim=dim, stride=1)


def _local_spec(config: TransformerConfig, shape: ModelShape) -> TransformerBlockSubmodules:
    """megatron-core's parallel linear layers around our own norm and attention: runs on any device."""
    layer = get_gpt_layer_local_spec(qk_layernorm=shape.qk_norm, normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    mlp = layer.submodules.mlp.submodules
    mlp.activation_func = SwiGLU
    layer.submodules.self_attention.module = SelfAttention
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    if shape.qk_norm:
        attention.q_layernorm = RMSNorm
        attention.k_layernorm = RMSNorm
    if not torch.cuda.is_available():
        attention.linear_qkv = mlp.linear_fc1 = ColumnParallelLinear
        attention.linear_proj = mlp.linear_fc2 = RowParallelLinear
        layer.submodules.mlp.module = GatedMLP
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm)


def _engine_spec(config: TransformerConfig, shape: ModelShape) -> ModuleSpec:
    return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=shape.qk_norm)


def _has_transformer_engine() -> bool:
    import importlib.util

    return importlib.util.find_spec("transformer_engine") is not None
