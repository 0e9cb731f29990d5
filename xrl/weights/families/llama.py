"""Llama 3.x, and the families that name their tensors like it: Mistral and InternLM3."""

from __future__ import annotations

from xrl.weights.families.shared import ATTENTION, DENSE_MLP, EMBEDDINGS, FINAL, MLP_BIAS, OUT_BIAS, QKV_BIAS
from xrl.weights.mapping import WeightTable

LLAMA = WeightTable(
    layer=ATTENTION + QKV_BIAS + OUT_BIAS,
    dense=DENSE_MLP + MLP_BIAS,
    embeddings=EMBEDDINGS,
    final=FINAL,
)

MISTRAL = WeightTable(layer=ATTENTION, dense=DENSE_MLP, embeddings=EMBEDDINGS, final=FINAL)

INTERNLM3 = LLAMA
