"""Mappings that the tables of several families share."""

from __future__ import annotations

from operator import attrgetter

from xrl.models.shape import ModelShape
from xrl.weights.mapping import Cut, WeightMapping, WeightMappings

EMBEDDINGS: WeightMappings = (
    WeightMapping(
        "embedding.word_embeddings.weight", Cut.VOCABULARY, {"model.embed_tokens.weight": ("vocabulary", "hidden")}
    ),
)


def _has_own_head(shape: ModelShape) -> bool:
    return not shape.tied_embeddings


# A tied head is the embedding under a second name; it exists as a parameter only where another stage has the embedding.
FINAL: WeightMappings = (
    WeightMapping("decoder.final_layernorm.weight", Cut.WHOLE, {"model.norm.weight": ("hidden",)}),
    WeightMapping(
        "output_layer.weight", Cut.VOCABULARY, {"lm_head.weight": ("vocabulary", "hidden")}, when=_has_own_head
    ),
    WeightMapping(
        "output_layer.weight",
        Cut.VOCABULARY,
        {"model.embed_tokens.weight": ("vocabulary", "hidden")},
        when=attrgetter("tied_embeddings"),
        is_copy=True,
    ),
)

ATTENTION: WeightMappings = (
    WeightMapping(
        "input_layernorm.weight",
        Cut.WHOLE,
        {"input_layernorm.weight": ("hidden",)},
        te_name="self_attention.linear_qkv.layer_norm_weight",
    ),
    WeightMapping(
        "self_attention.linear_qkv.weight",
        Cut.HEADS,
        {
            "self_attn.q_proj.weight": ("queries", "hidden"),
            "self_attn.k_proj.weight": ("keys", "hidden"),
            "self_attn.v_proj.weight": ("keys", "hidden"),
        },
    ),
    WeightMapping("self_attention.linear_proj.weight", Cut.INPUTS, {"self_attn.o_proj.weight": ("hidden", "queries")}),
)

QKV_BIAS: WeightMappings = (
    WeightMapping(
        "self_attention.linear_qkv.bias",
        Cut.HEADS,
        {
            "self_attn.q_proj.bias": ("queries",),
            "self_attn.k_proj.bias": ("keys",),
            "self_attn.v_proj.bias": ("keys",),
        },
        when=attrgetter("qkv_bias"),
    ),
)

OUT_BIAS: WeightMappings = (
    WeightMapping(
        "self_attention.linear_proj.bias",
        Cut.WHOLE,
        {"self_attn.o_proj.bias": ("hidden",)},
        when=attrgetter("out_bias"),
    ),
)

QK_NORM: WeightMappings = (
    WeightMapping("self_attention.q_layernorm.weight", Cut.WHOLE, {"self_attn.q_norm.weight": ("head",)}),
    WeightMapping("self_attention.k_layernorm.weight", Cut.WHOLE, {"self_attn.k_norm.weight": ("head",)}),
)

DENSE_MLP: WeightMappings = (
    WeightMapping(
        "pre_mlp_layernorm.weight",
        Cut.WHOLE,
        {"post_attention_layernorm.weight": ("hidden",)},
        te_name="mlp.linear_fc1.layer_norm_weight",
    ),
    WeightMapping(
        "mlp.linear_fc1.weight",
        Cut.OUTPUTS,
        {"mlp.gate_proj.weight": ("ffn", "hidden"), "mlp.up_proj.weight": ("ffn", "hidden")},
    ),
    WeightMapping("mlp.linear_fc2.weight", Cut.INPUTS, {"mlp.down_proj.weight": ("hidden", "ffn")}),
)

MLP_BIAS: WeightMappings = (
    WeightMapping(
        "mlp.linear_fc1.bias",
        Cut.OUTPUTS,
        {"mlp.gate_proj.bias": ("ffn",), "mlp.up_proj.bias": ("ffn",)},
        when=attrgetter("mlp_bias"),
    ),
    WeightMapping("mlp.linear_fc2.bias", Cut.WHOLE, {"mlp.down_proj.bias": ("hidden",)}, when=attrgetter("mlp_bias")),
)

# The router sees the same normalised input as the experts, so this norm is a module of its own everywhere.
EXPERTS: WeightMappings = (
    WeightMapping("pre_mlp_layernorm.weight", Cut.WHOLE, {"post_attention_layernorm.weight": ("hidden",)}),
    WeightMapping("mlp.router.weight", Cut.WHOLE, {"mlp.gate.weight": ("experts", "hidden")}),
    WeightMapping(
        "mlp.experts.local_experts.{expert}.linear_fc1.weight",
        Cut.OUTPUTS,
        {
            "mlp.experts.{expert}.gate_proj.weight": ("expert_ffn", "hidden"),
            "mlp.experts.{expert}.up_proj.weight": ("expert_ffn", "hidden"),
        },
        te_name="mlp.experts.linear_fc1.weight{expert}",
    ),
    WeightMapping(
        "mlp.experts.local_experts.{expert}.linear_fc2.weight",
        Cut.INPUTS,
        {"mlp.experts.{expert}.down_proj.weight": ("hidden", "expert_ffn")},
        te_name="mlp.experts.linear_fc2.weight{expert}",
    ),
)
