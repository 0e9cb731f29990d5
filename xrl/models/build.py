"""A megatron-core GPTModel of a Hugging Face decoder: this rank's part of it, without weights."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from xrl.config import ModelConfig, ParallelConfig
from xrl.kernels.layers.choice import why_not_te
from xrl.models.choice import layer_kind
from xrl.models.layers import local_layers, te_layers
from xrl.models.rotary import rotary_frequencies
from xrl.models.shape import ExpertShape, LatentAttention, ModelShape
from xrl.parallel.groups import ParallelGroups
from xrl.parallel.layout import Layout


def uses_transformer_engine(config: ModelConfig, shape: ModelShape) -> bool:
    """Whether layers are transformer-engine's: asked for, or on CUDA with the package installed.

    Latent attention is always our own.
    """
    return not why_not_te(layer_kind(shape, transformer_impl=config.transformer_impl))


def train_dtype(config: ModelConfig) -> torch.dtype:
    """bf16 on CUDA and fp32 on CPU, unless told otherwise."""
    bf16 = torch.cuda.is_available() if config.bf16 is None else config.bf16
    return torch.bfloat16 if bf16 else torch.float32


def transformer_config(
    shape: ModelShape, model: ModelConfig, parallel: ParallelConfig, layout: Layout, *, transformer_engine: bool
) -> TransformerConfig:
    """megatron-core's configuration of the decoder."""
    dtype = train_dtype(model)
    on_cuda = torch.cuda.is_available()
    further: dict[str, Any] = {}
    if model.recompute_granularity == "full":
        further = {"recompute_method": "uniform", "recompute_num_layers": model.recompute_num_layers}
    if not layout.is_even(shape.num_layers):
        further["pipeline_model_parallel_layout"] = layout.pipeline_layout(shape.num_layers)
    if shape.experts is not None:
        moe_layers = [int(shape.has_experts(layer)) for layer in range(shape.num_layers)]
        further |= {
            **_expert_settings(shape.experts),
            "moe_layer_freq": moe_layers,
            # One operation for all experts of a rank; our own layers take them one by one.
            "moe_grouped_gemm": transformer_engine,
        }
    if shape.latent is not None:
        further |= _latent_settings(shape.latent)
    make = TransformerConfig if shape.latent is None else MLATransformerConfig
    with _quiet_megatron():
        return make(
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
            expert_model_parallel_size=parallel.expert_model_parallel_size,
            sequence_parallel=parallel.sequence_parallel,
            # Packs differ in length: the stages tell each other. megatron-core ties this to a dispatcher of tokens to
            # experts, even where there are none.
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
            **further,
        )


def _expert_settings(experts: ExpertShape) -> dict[str, Any]:
    """Every token goes to all of its experts. Nothing but the loss teaches the router, and its bias stays as it is."""
    groups = {}
    if experts.num_groups > 1:
        groups = {"moe_router_num_groups": experts.num_groups, "moe_router_group_topk": experts.groups_per_token}
    return groups | {
        "num_moe_experts": experts.num_experts,
        "moe_router_topk": experts.experts_per_token,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size or None,
        "moe_shared_expert_gate": experts.shared_gate,
        "moe_router_score_function": experts.score_function,
        # A softmax over the chosen ones alone is that over all, divided by their sum.
        "moe_router_pre_softmax": experts.score_function == "softmax" and not experts.normalize_top_k,
        "moe_router_topk_scaling_factor": None if experts.scaling_factor == 1.0 else experts.scaling_factor,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_router_enable_expert_bias": experts.score_bias,
        "moe_router_bias_update_rate": 0.0,
    }


def _latent_settings(latent: LatentAttention) -> dict[str, Any]:
    return {
        "q_lora_rank": latent.q_lora_rank,
        "kv_lora_rank": latent.kv_lora_rank,
        "qk_head_dim": latent.qk_nope_head_dim,
        "qk_pos_emb_head_dim": latent.qk_rope_head_dim,
        "v_head_dim": latent.v_head_dim,
        "rope_type": "rope",  # unused: our own attention turns queries and keys
    }


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
    make_layers = te_layers if transformer_engine else local_layers
    with _quiet_megatron():
        model = GPTModel(
            config=config,
            transformer_layer_spec=make_layers(shape, groups.layout.layers(groups.pipeline_rank, shape.num_layers)),
            vocab_size=groups.layout.padded_vocab_size(shape.vocab_size),
            max_sequence_length=shape.max_positions,
            pre_process=groups.is_first_stage,
            post_process=groups.is_last_stage,
            share_embeddings_and_output_weights=shape.tied_embeddings,
            position_embedding_type="rope" if transformer_engine else "none",
            rotary_base=int(shape.rope_base),
        )
    if transformer_engine:
        # megatron-core rounds the base, and knows one setting only of the scaling.
        model.rotary_pos_emb.inv_freq = rotary_frequencies(shape).to(groups.device)
    _mark_tensor_parallel(model)
    return model.to(groups.device)


@contextlib.contextmanager
def _quiet_megatron() -> Iterator[None]:
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
