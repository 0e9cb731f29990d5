"""Mapping tables, one a family: Megatron parameters <-> Hugging Face tensors."""

from __future__ import annotations

from xrl.weights.families.deepseek import DEEPSEEK_V3
from xrl.weights.families.llama import INTERNLM3, LLAMA, MISTRAL
from xrl.weights.families.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
from xrl.weights.mapping import WeightTable

# By the architecture in config.json.
TABLES: dict[str, WeightTable] = {
    "Qwen2ForCausalLM": QWEN2,
    "Qwen2MoeForCausalLM": QWEN2_MOE,
    "Qwen3ForCausalLM": QWEN3,
    "Qwen3MoeForCausalLM": QWEN3_MOE,
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "InternLM3ForCausalLM": INTERNLM3,
    "DeepseekV3ForCausalLM": DEEPSEEK_V3,
}
