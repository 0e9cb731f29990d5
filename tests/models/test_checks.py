"""config.json of every family: what changes the maths is refused by name, whatever the family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.models.published_configs import LLAMA3_ROPE, PUBLISHED, REFUSED
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


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_pass(name: str) -> None:
    checked_shape(PUBLISHED[name], Path("config.json"))


@pytest.mark.parametrize("name", REFUSED)
def test_published_configs_that_we_do_not_compute_are_refused_by_what_they_say(name: str) -> None:
    config, words = REFUSED[name]
    with pytest.raises(SettingsError, match=words):
        checked_shape(config, Path("config.json"))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Qwen2.5-7B", {"use_mrope": True}),
        ("SmolLM2-135M", {"rope_interleaved": True}),
        ("Falcon3-7B", {"activation": "gelu"}),
        ("Qwen3-Coder-30B-A3B", {"use_qk_norm": False}),
        ("Qwen3-Coder-30B-A3B", {"qkv_bias": True}),
        ("Qwen3-Coder-30B-A3B", {"shared_expert_intermediate_size": 512}),
    ],
)
def test_the_other_value_of_a_published_key_is_refused(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(changes))):
        checked_shape(PUBLISHED[name] | changes, Path("config.json"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_types": 5}, "layer_types must be a list or null, found 5"),
        ({"num_hidden_layers": 2, "rope_scaling": {"rope_type": "llama3"}}, "factor must be a number > 0"),
    ],
)
def test_values_of_another_kind_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        checked_shape(PUBLISHED["Llama-3.1-8B"] | changes, Path("config.json"))


def test_two_spellings_must_say_the_same() -> None:
    config = PUBLISHED["internlm3-8b-instruct"]
    for first, second in ((True, False), (False, True)):
        with pytest.raises(SettingsError, match="qkv_bias and attention_bias differ, but mean the same"):
            checked_shape(config | {"attention_bias": first, "qkv_bias": second}, Path("config.json"))


def test_original_positions_of_llama3_may_be_left_out() -> None:
    config = {k: v for k, v in PUBLISHED["Llama-3.1-8B"].items() if k != "max_position_embeddings"}
    for original in ({}, {"original_max_position_embeddings": None}):
        rope = {k: v for k, v in LLAMA3_ROPE.items() if k != "original_max_position_embeddings"}
        shape = checked_shape(config | {"rope_scaling": rope | original}, Path("config.json"))
        assert shape.rope_scaling is not None and shape.rope_scaling.original_max_positions == 2048


def test_a_tiny_model_is_made_of_these_fields() -> None:
    assert make_model("mistral").config.sliding_window is None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 10**6),
        ("vocab_size", 2**31),
        ("hidden_size", 10**400),
        ("rope_theta", 10**400),
        ("rms_norm_eps", -(10**400)),
        ("rms_norm_eps", float("inf")),
        ("intermediate_size", True),
        ("num_attention_heads", "4"),
        ("max_position_embeddings", [256]),
        ("dtype", "x"),
        ("torch_dtype", "torch.float32"),
        ("dtype", 5),
        ("dtype", ["float32"]),
    ],
)
def test_values_that_cannot_be_are_named(family: str, field: str, value: object) -> None:
    sentence = refusal(family, **{field: value})
    assert f"{field} " in sentence and len(sentence) < 300


def test_a_key_cannot_be_a_line_of_its_own() -> None:
    sentence = refusal("qwen3", **{"\x1b[2J\nxrl: error: fake": "\u202e" + "x" * 10**6})
    assert sentence.isprintable() and "\\x1b[2J\\nxrl: error: fake is " in sentence and len(sentence) < 400
