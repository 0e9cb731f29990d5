"""The table of families against transformers' config classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.tiny_models import FAMILIES as TINY
from xrl.models.checks import checked_shape
from xrl.models.families import FAMILIES
from xrl.models.shape import ModelShape, model_shape

SIZES = {
    "vocab_size": 98,
    "hidden_size": 512,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 256,
}


def shape_of(architecture: str, **fields: Any) -> ModelShape:
    return model_shape({"architectures": [architecture], **SIZES, **fields})


def test_there_is_a_tiny_model_of_every_family() -> None:
    assert {config_class for config_class, _ in TINY.values()} == {family.config_class for family in FAMILIES.values()}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_keys_that_are_left_out_mean_what_they_mean_to_transformers(architecture: str) -> None:
    family = FAMILIES[architecture]
    config_class = getattr(transformers, family.config_class)
    assert config_class.model_type == family.model_type
    filled = config_class(**SIZES).to_dict() | {"architectures": [architecture]}
    assert shape_of(architecture) == model_shape(filled)
    # Every default is one of transformers', none is kept for a key it does not have.
    assert all(getattr(config_class(**SIZES), name) == default for name, default in family.defaults.items())


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_key_that_transformers_writes_is_known(architecture: str) -> None:
    config = getattr(transformers, FAMILIES[architecture].config_class)().to_dict()
    shape = checked_shape({**config, "architectures": [architecture]}, Path("config.json"))
    assert shape.architecture == architecture


def test_null_key_value_heads_are_as_many_as_heads() -> None:
    assert shape_of("LlamaForCausalLM", num_key_value_heads=None).num_kv_heads == 256
    assert shape_of("LlamaForCausalLM").num_kv_heads == 256
    assert shape_of("MistralForCausalLM", num_key_value_heads=None).num_kv_heads == 256
    assert shape_of("MistralForCausalLM").num_kv_heads == 8


def test_null_rank_of_queries_is_a_plain_projection() -> None:
    assert shape_of("DeepseekV3ForCausalLM", q_lora_rank=None).latent.q_lora_rank is None  # type: ignore[union-attr]
    assert shape_of("DeepseekV3ForCausalLM").latent.q_lora_rank == 1536  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "rope",
    [
        {
            "rope_scaling": {
                "type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "rope_theta": 500000.0,
        },
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_theta": 500000.0,
            }
        },
    ],
    ids=["rope_scaling", "rope_parameters"],
)
def test_rotary_scaling_is_read_in_both_spellings(rope: dict[str, Any]) -> None:
    shape = shape_of("LlamaForCausalLM", **rope)
    assert shape.rope_base == 500000.0
    assert shape.rope_scaling is not None
    assert (shape.rope_scaling.factor, shape.rope_scaling.original_max_positions) == (8.0, 8192)


def test_internlm3_keeps_its_name_after_transformers_saved_it_as_a_llama() -> None:
    shape = shape_of("LlamaForCausalLM", model_type="internlm3", qkv_bias=True, bias=True)
    assert (shape.architecture, shape.head_dim) == ("InternLM3ForCausalLM", 128)
    assert shape.qkv_bias and shape.out_bias and shape.mlp_bias
