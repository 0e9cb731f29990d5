"""Tiny shapes of every family, and random tensors for them."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import torch

from xrl.models.shape import ExpertShape, LatentAttention, ModelShape
from xrl.parallel.layout import Layout, Place
from xrl.weights.plan import Plan, part_names, tensor_shapes
from xrl.weights.slices import ReadSlice

# 13 rows divide over neither 2 nor 4 tensor ranks.
_DENSE = ModelShape(
    architecture="",
    num_layers=4,
    hidden_size=8,
    ffn_hidden_size=12,
    num_heads=8,
    num_kv_heads=4,
    head_dim=2,
    vocab_size=13,
    max_positions=32,
    norm_eps=1e-6,
    rope_base=10000.0,
    tied_embeddings=False,
    qkv_bias=False,
    qk_norm=False,
)
_EXPERTS = ExpertShape(num_experts=4, experts_per_token=2, ffn_hidden_size=4, normalize_top_k=True)

# name -> shape: what a table can say, each at least once.
SHAPES: dict[str, ModelShape] = {
    "qwen2": replace(_DENSE, architecture="Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": replace(_DENSE, architecture="Qwen3ForCausalLM", qk_norm=True),
    "qwen3_moe": replace(_DENSE, architecture="Qwen3MoeForCausalLM", qk_norm=True, experts=_EXPERTS),
    "qwen2_moe": replace(
        _DENSE,
        architecture="Qwen2MoeForCausalLM",
        qkv_bias=True,
        experts=replace(_EXPERTS, shared_ffn_hidden_size=8, shared_gate=True),
    ),
    "llama": replace(_DENSE, architecture="LlamaForCausalLM"),
    "llama with biases": replace(_DENSE, architecture="LlamaForCausalLM", qkv_bias=True, out_bias=True, mlp_bias=True),
    "mistral": replace(_DENSE, architecture="MistralForCausalLM"),
    "internlm3": replace(_DENSE, architecture="InternLM3ForCausalLM", qkv_bias=True),
    "deepseek_v3": replace(
        _DENSE,
        architecture="DeepseekV3ForCausalLM",
        num_kv_heads=8,
        latent=LatentAttention(q_lora_rank=8, kv_lora_rank=6, qk_nope_head_dim=3, qk_rope_head_dim=2, v_head_dim=2),
        experts=replace(
            _EXPERTS,
            shared_ffn_hidden_size=4,
            first_dense_layers=1,
            score_function="sigmoid",
            score_bias=True,
        ),
    ),
    "deepseek_v3 with whole queries": replace(
        _DENSE,
        architecture="DeepseekV3ForCausalLM",
        num_kv_heads=8,
        latent=LatentAttention(q_lora_rank=None, kv_lora_rank=6, qk_nope_head_dim=3, qk_rope_head_dim=2, v_head_dim=2),
        experts=replace(_EXPERTS, score_function="sigmoid", score_bias=True),
    ),
}


def layouts(shape: ModelShape) -> list[Layout]:
    """TP{1,2,4} x PP{1,2,4} x VPP{1,2} x EP{1,2,4}, where a model of this shape can be laid out so."""
    expert_sizes = (1, 2, 4) if shape.experts else (1,)
    return [
        Layout(
            tensor_size=tensor,
            pipeline_size=pipeline,
            virtual_pipeline_size=virtual,
            expert_size=expert,
            data_size=expert,
        )
        for tensor, pipeline, virtual, expert in product((1, 2, 4), (1, 2, 4), (1, 2), expert_sizes)
        if virtual == 1 or pipeline > 1
    ]


def with_layers(shape: ModelShape, num_layers: int, *, tied: bool) -> ModelShape:
    return replace(shape, num_layers=num_layers, tied_embeddings=tied)


def random_tensors(shape: ModelShape, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Hugging Face tensors of a model; all their numbers differ."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(size, generator=generator).to(dtype)
        for part in part_names(shape)
        for name, size in tensor_shapes(shape, part).items()
    }


def reader(tensors: dict[str, torch.Tensor]) -> ReadSlice:
    return lambda name, dim, start, stop: tensors[name].narrow(dim, start, stop - start)


def places(planned: Plan) -> list[Place]:
    """Every rank."""
    return [planned.layout.place(rank) for rank in range(planned.layout.world_size)]


def load(planned: Plan, place: Place, read: ReadSlice) -> list[dict[str, torch.Tensor]]:
    """A rank's parameters, NaN where nothing was loaded."""
    from xrl.weights.slices import fill

    stages: list[dict[str, torch.Tensor]] = [{} for _ in range(planned.layout.virtual_pipeline_size)]
    for parameter in planned.parameters(place):
        tensor = torch.full(parameter.shape, torch.nan)
        fill(parameter, tensor, read)
        name = parameter.names[0]
        assert name not in stages[parameter.virtual_stage]
        stages[parameter.virtual_stage][name] = tensor
    return stages
