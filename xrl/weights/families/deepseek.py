"""DeepSeek-V3: latent attention, routed and shared experts, plain MLPs in the first layers."""

from __future__ import annotations

from xrl.models.shape import ModelShape
from xrl.weights.families.shared import DENSE_MLP, EMBEDDINGS, EXPERTS, FINAL
from xrl.weights.mapping import Cut, WeightMapping, WeightMappings, WeightTable


def _compresses_queries(shape: ModelShape) -> bool:
    return shape.latent is not None and shape.latent.q_lora_rank is not None


def _projects_queries_at_once(shape: ModelShape) -> bool:
    return not _compresses_queries(shape)


def _has_shared_expert(shape: ModelShape) -> bool:
    return shape.experts is not None and shape.experts.shared_ffn_hidden_size > 0


def _has_score_bias(shape: ModelShape) -> bool:
    return shape.experts is not None and shape.experts.score_bias


# megatron-core cuts the projections down to the latent vectors over its own tensor ranks; transformer-engine's layers
# hold them whole on each.
LATENT_ATTENTION: WeightMappings = (
    WeightMapping("input_layernorm.weight", Cut.WHOLE, {"input_layernorm.weight": ("hidden",)}),
    WeightMapping(
        "self_attention.linear_q_proj.weight",
        Cut.OUTPUTS,
        {"self_attn.q_proj.weight": ("latent_queries", "hidden")},
        when=_projects_queries_at_once,
    ),
    WeightMapping(
        "self_attention.linear_q_down_proj.weight",
        Cut.OUTPUTS,
        {"self_attn.q_a_proj.weight": ("query_rank", "hidden")},
        when=_compresses_queries,
        te_cut=Cut.WHOLE,
    ),
    WeightMapping(
        "self_attention.q_layernorm.weight",
        Cut.WHOLE,
        {"self_attn.q_a_layernorm.weight": ("query_rank",)},
        when=_compresses_queries,
        te_name="self_attention.linear_q_up_proj.layer_norm_weight",
    ),
    WeightMapping(
        "self_attention.linear_q_up_proj.weight",
        Cut.OUTPUTS,
        {"self_attn.q_b_proj.weight": ("latent_queries", "query_rank")},
        when=_compresses_queries,
    ),
    WeightMapping(
        "self_attention.linear_kv_down_proj.weight",
        Cut.OUTPUTS,
        {"self_attn.kv_a_proj_with_mqa.weight": ("kv_rank_and_rope", "hidden")},
        te_cut=Cut.WHOLE,
    ),
    WeightMapping(
        "self_attention.kv_layernorm.weight",
        Cut.WHOLE,
        {"self_attn.kv_a_layernorm.weight": ("kv_rank",)},
        te_name="self_attention.linear_kv_up_proj.layer_norm_weight",
    ),
    WeightMapping(
        "self_attention.linear_kv_up_proj.weight",
        Cut.OUTPUTS,
        {"self_attn.kv_b_proj.weight": ("latent_keys_values", "kv_rank")},
    ),
    WeightMapping(
        "self_attention.linear_proj.weight", Cut.INPUTS, {"self_attn.o_proj.weight": ("hidden", "latent_values")}
    ),
)

SHARED_EXPERT: WeightMappings = (
    WeightMapping(
        "mlp.shared_experts.linear_fc1.weight",
        Cut.OUTPUTS,
        {
            "mlp.shared_experts.gate_proj.weight": ("shared_ffn", "hidden"),
            "mlp.shared_experts.up_proj.weight": ("shared_ffn", "hidden"),
        },
        when=_has_shared_expert,
    ),
    WeightMapping(
        "mlp.shared_experts.linear_fc2.weight",
        Cut.INPUTS,
        {"mlp.shared_experts.down_proj.weight": ("hidden", "shared_ffn")},
        when=_has_shared_expert,
    ),
)

# Added to the scores that choose experts: a buffer, kept in fp32, which bf16 would round away.
SCORE_BIAS: WeightMappings = (
    WeightMapping(
        "mlp.router.expert_bias",
        Cut.WHOLE,
        {"mlp.gate.e_score_correction_bias": ("experts",)},
        when=_has_score_bias,
        keeps_dtype=True,
    ),
)

DEEPSEEK_V3 = WeightTable(
    layer=LATENT_ATTENTION,
    dense=DENSE_MLP,
    sparse=EXPERTS + SCORE_BIAS + SHARED_EXPERT,
    embeddings=EMBEDDINGS,
    final=FINAL,
)
