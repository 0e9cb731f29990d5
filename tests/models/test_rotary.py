"""Rotary frequencies against transformers', at the sizes of published models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import InternLM3Config, LlamaConfig, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from xrl.models.rotary import rotary_frequencies, rotary_table
from xrl.models.shape import model_shape

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CASES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama-2": (LlamaConfig, {"rope_theta": 10000.0}),
    "llama-3.1-8b": (LlamaConfig, LLAMA3 | {"factor": 8.0}),
    "llama-3.2-1b": (LlamaConfig, LLAMA3 | {"factor": 32.0}),
    "internlm3-8b": (InternLM3Config, {"rope_type": "dynamic", "factor": 6.0, "rope_theta": 50000000.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_angles_are_those_of_transformers_up_to_the_last_position(case: str) -> None:
    config_class, rope = CASES[case]
    config = config_class(head_dim=128, max_position_embeddings=4096, rope_parameters=dict(rope))
    positions = torch.tensor([0, 1, 77, 4095])
    expected_cos, expected_sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    shape = model_shape(config.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    cos, sin = rotary_table(positions, rotary_frequencies(shape))
    torch.testing.assert_close(cos.repeat(1, 2), expected_cos[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(sin.repeat(1, 2), expected_sin[0], rtol=0, atol=1e-6)
