"""Qwen2, Qwen2.5, Qwen3, and their mixtures of experts."""

from __future__ import annotations

from xrl.weights.families.shared import (
    ATTENTION,
    DENSE_MLP,
    EMBEDDINGS,
    EXPERTS,
    FINAL,
    OUT_BIAS,
    QK_NORM,
    QKV_BIAS,
)
from xrl.weights.mapping import Cut, WeightMapping, WeightMappings, WeightTable

QWEN2 = WeightTable(layer=ATTENTION + QKV_BIAS, dense=DENSE_MLP, embeddings=EMBEDDINGS, final=FINAL)

QWEN3 = WeightTable(
    layer=ATTENTION + QKV_BIAS + OUT_BIAS + QK_NORM, dense=DENSE_MLP, embeddings=EMBEDDINGS, final=FINAL
)

QWEN3_MOE = WeightTable(
    layer=ATTENTION + QKV_BIAS + OUT_BIAS + QK_NORM,
    dense=DENSE_MLP,
    sparse=EXPERTS,
    embeddings=EMBEDDINGS,
    final=FINAL,
)

# One expert that every token passes, weighted by a gate of its own.
SHARED_EXPERT: WeightMappings = (
    WeightMapping(
        "mlp.shared_experts.linear_fc1.weight",
        Cut.OUTPUTS,
        {
            "mlp.shared_expert.gate_proj.weight": ("shared_ffn", "hidden"),
            "mlp.shared_expert.up_proj.weight": ("shared_ffn", "hidden"),
        },
    ),
    WeightMapping(
        "mlp.shared_experts.linear_fc2.weight",
        Cut.INPUTS,
        {"mlp.shared_expert.down_proj.weight": ("hidden", "shared_ffn")},
    ),
    WeightMapping("mlp.shared_experts.gate_weight", Cut.WHOLE, {"mlp.shared_expert_gate.weight": ("one", "hidden")}),
)

QWEN2_MOE = WeightTable(
    layer=ATTENTION + QKV_BIAS,
    dense=DENSE_MLP,
    sparse=EXPERTS + SHARED_EXPERT,
    embeddings=EMBEDDINGS,
    final=FINAL,
)
