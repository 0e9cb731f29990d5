"""config.json of every family: what changes the maths is refused by name, whatever the family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.tiny_models import FAMILIES, make_model
from xrl.config import SettingsError
from xrl.models.checks import checked_shape


def config_of(family: str) -> dict[str, Any]:
    config_class, fields = FAMILIES[family]
    sizes = {
        "vocab_size": 98,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    architecture = {
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
        "qwen2_moe": "Qwen2MoeForCausalLM",
        "qwen3_moe": "Qwen3MoeForCausalLM",
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "internlm3": "InternLM3ForCausalLM",
        "deepseek_v3": "DeepseekV3ForCausalLM",
    }[family]
    config = getattr(transformers, config_class)(**(sizes | fields))
    return config.to_dict() | {"architectures": [architecture]}


def refusal(family: str, **fields: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        checked_shape(config_of(family) | fields, Path("config.json"))
    return str(caught.value)


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("qwen2", "attention_bias", True),
        ("qwen2", "sliding_window_pattern", 6),
        ("qwen2_moe", "shared_expert_intermediate_size", 0),
        ("qwen2_moe", "mlp_only_layers", [1]),
        ("qwen3_moe", "num_experts_per_tok", 1),
        ("qwen3_moe", "mlp_only_layers", [0]),
        ("qwen3_moe", "decoder_sparse_step", 2),
        ("qwen3_moe", "num_experts_per_tok", 9),
        ("qwen3_moe", "shared_expert_intermediate_size", 64),
        ("llama", "sliding_window", 128),
        ("llama", "attention_multiplier", 0.5),
        ("mistral", "attention_bias", True),
        ("mistral", "sliding_window", 0),
        ("internlm3", "bias", True),
        ("internlm3", "attention_bias", True),
        ("deepseek_v3", "attention_bias", True),
        ("deepseek_v3", "norm_topk_prob", False),
        ("deepseek_v3", "scoring_func", "softmax"),
        ("deepseek_v3", "topk_method", "greedy"),
        ("deepseek_v3", "moe_layer_freq", 2),
        ("deepseek_v3", "rope_interleave", False),
        ("deepseek_v3", "n_group", 3),
        ("deepseek_v3", "num_experts_per_tok", 6),
        ("deepseek_v3", "first_k_dense_replace", 4),
        ("deepseek_v3", "q_lora_rank", 0),
    ],
)
def test_what_changes_the_maths_is_named(family: str, field: str, value: Any) -> None:
    assert field in refusal(family, **{field: value})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_key_nobody_knows_is_refused_unless_null(family: str) -> None:
    sentence = refusal(family, embedding_multiplier=12.0)
    assert "embedding_multiplier is 12.0" in sentence and "take the key out" in sentence
    checked_shape(config_of(family) | {"embedding_multiplier": None, "torch_dtype": "bfloat16"}, Path("config.json"))


def test_wavelengths_in_the_wrong_order_are_refused() -> None:
    rope = config_of("llama")["rope_parameters"] | {"low_freq_factor": 4.0}
    assert "low_freq_factor 4" in refusal("llama", rope_parameters=rope)


def test_a_missing_factor_of_the_rotary_scaling_is_named() -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 64}
    assert "rope_parameters.high_freq_factor" in refusal("llama", rope_parameters=rope)


def test_published_configs_pass() -> None:
    """Keys as the model cards of Qwen2.5, Llama 3.1, Mistral 0.3, InternLM3 and Moonlight have them."""
    for name, config in PUBLISHED.items():
        checked_shape(config, Path(name))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_types": 5}, "layer_types must be a list or null, found 5"),
        ({"num_hidden_layers": 2, "rope_scaling": {"rope_type": "llama3"}}, "factor must be a number > 0"),
    ],
)
def test_values_of_another_kind_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        checked_shape(PUBLISHED["llama-3.1-8b"] | changes, Path("config.json"))


def test_two_spellings_must_say_the_same() -> None:
    config = PUBLISHED["internlm3-8b"]
    for first, second in ((True, False), (False, True)):
        with pytest.raises(SettingsError, match="qkv_bias and attention_bias differ, but mean the same"):
            checked_shape(config | {"attention_bias": first, "qkv_bias": second}, Path("config.json"))


def test_original_positions_of_llama3_may_be_left_out() -> None:
    config = {k: v for k, v in PUBLISHED["llama-3.1-8b"].items() if k != "max_position_embeddings"}
    for original in ({}, {"original_max_position_embeddings": None}):
        rope = {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"} | {"rope_type": "llama3"}
        shape = checked_shape(config | {"rope_scaling": rope | original}, Path("config.json"))
        assert shape.rope_scaling is not None and shape.rope_scaling.original_max_positions == 2048


def test_a_tiny_model_is_made_of_these_fields() -> None:
    assert make_model("mistral").config.sliding_window is None


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
BASICS = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "attention_dropout": 0.0,
    "transformers_version": "4.43.1",
    "tie_word_embeddings": False,
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen2.5-7b": BASICS
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "use_sliding_window": False,
        "vocab_size": 152064,
    },
    "llama-3.1-8b": BASICS
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": LLAMA3 | {"rope_type": "llama3"},
        "rope_theta": 500000.0,
        "vocab_size": 128256,
    },
    "mistral-7b-v0.3": BASICS
    | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "vocab_size": 32768,
    },
    "internlm3-8b": BASICS
    | {
        "architectures": ["InternLM3ForCausalLM"],
        "model_type": "internlm3",
        "bias": False,
        "qkv_bias": False,
        "auto_map": {"AutoConfig": "configuration_internlm3.InternLM3Config"},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 10240,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 48,
        "num_key_value_heads": 2,
        "pad_token_id": 2,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"},
        "rope_theta": 50000000,
        "vocab_size": 128512,
    },
    "qwen3-30b-a3b": BASICS
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "bos_token_id": 151643,
        "decoder_sparse_step": 1,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "moonlight-16b-a3b": BASICS
    | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "attention_bias": False,
        "aux_loss_alpha": 0.001,
        "bos_token_id": 163584,
        "eos_token_id": 163585,
        "ep_size": 1,
        "first_k_dense_replace": 1,
        "hidden_size": 2048,
        "intermediate_size": 11264,
        "kv_lora_rank": 512,
        "max_position_embeddings": 8192,
        "moe_intermediate_size": 1408,
        "moe_layer_freq": 1,
        "n_group": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "norm_topk_prob": True,
        "num_attention_heads": 16,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 27,
        "num_key_value_heads": 16,
        "num_nextn_predict_layers": 0,
        "pad_token_id": 163838,
        "pretraining_tp": 1,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-05,
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.446,
        "scoring_func": "sigmoid",
        "seq_aux": True,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "v_head_dim": 128,
        "vocab_size": 163840,
    },
}
