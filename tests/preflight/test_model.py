"""config.json is refused where it is missing, damaged, or says maths that we do not compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.small_runs import Refusal, check, edit_json
from tests.tiny_models import FAMILIES, make_checkpoint
from xrl.config import SettingsError
from xrl.preflight.model import check_model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_every_supported_family_passes(family: str, tied: bool, data: Path, tmp_path: Path) -> None:
    # The embedded engine does not run all of them; any importable module passes for an engine here.
    engine = "string:Template" if family in ("qwen2_moe", "deepseek_v3") else "embedded"
    check(make_checkpoint(tmp_path / "other", family=family, tied=tied), data, tmp_path, "--engine", engine)


@pytest.mark.parametrize(
    ("family", "part"), [("deepseek_v3", "latent attention of Deepseek"), ("qwen2_moe", "shared expert of Qwen2Moe")]
)
def test_what_the_embedded_engine_does_not_run_is_refused(family: str, part: str, data: Path, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "other", family=family)
    with pytest.raises(SettingsError, match=f"--engine embedded does not run the {part}"):
        check(model, data, tmp_path)


def test_missing_model_folder_is_refused(refusal: Refusal) -> None:
    assert "--model nowhere does not exist" in refusal("--model", "nowhere")
    assert "hf download" not in refusal("--model", "nowhere")
    assert "hf download" not in refusal("--model", "/nowhere/model")
    download = "hf download Qwen/Qwen3-8B --local-dir models/Qwen3-8B"
    assert refusal("--model", "Qwen/Qwen3-8B").endswith(f"or get it from the hub first: {download}")


def test_model_that_is_a_file_is_refused(refusal: Refusal, model: Path) -> None:
    assert "is not a folder" in refusal("--model", str(model / "config.json"))


def test_missing_config_is_refused(refusal: Refusal, model: Path) -> None:
    (model / "config.json").unlink()
    assert f"--model {model} has no config.json" in refusal()


def test_config_that_is_not_json_is_named_with_its_line(refusal: Refusal, model: Path) -> None:
    (model / "config.json").write_text('{\n"hidden_size": 64,\n}')
    assert f"{model}/config.json, line 3 is not JSON" in refusal()


def test_config_that_is_no_object_is_refused(refusal: Refusal, model: Path) -> None:
    (model / "config.json").write_text("[]")
    assert "needs a JSON object, found a list" in refusal()


@pytest.mark.parametrize("architectures", [["GraniteForCausalLM"], ["qwen3"], [], None])
def test_unsupported_architecture_lists_the_supported_ones(
    refusal: Refusal, model: Path, architectures: list[str] | None
) -> None:
    edit_json(model / "config.json", architectures=architectures)
    sentence = refusal()
    assert (architectures or ["none"])[0] in sentence
    assert "Qwen2ForCausalLM" in sentence and "Qwen3ForCausalLM" in sentence


@pytest.mark.parametrize(
    "field",
    [
        {"hidden_act": "gelu"},
        {"use_sliding_window": True},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"attention_bias": "yes"},
        {"attention_dropout": 0.1},
        {"mlp_bias": True},
        {"partial_rotary_factor": 0.5},
        {"model_type": "llama"},
        {"residual_multiplier": 0.22},
        {"final_logit_softcapping": 30.0},
        {"no_rope_layers": [1, 0]},
        {"quantization_config": {"bits": 4}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_scaling": "linear"},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0}},
        {"rope_parameters": {"rope_theta": 10000.0, "mrope_section": [2, 3, 3]}},
        {"rope_scaling": {"type": "dynamic", "factor": "2"}},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},  # beside rope_parameters that say another type
        {"rope_theta": 500000.0},  # beside another one in rope_parameters
        {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        {"rope_parameters": {"full_attention": {"rope_theta": 10000.0}}},
        {"num_hidden_layers": 0},
        {"vocab_size": "98"},
        {"num_key_value_heads": 3},
        {"rope_theta": "10000"},
        {"rope_theta": -1.0},
        {"rope_parameters": {"rope_theta": "10000"}},
        {"rms_norm_eps": "small"},
        {"rms_norm_eps": 0},
        {"tie_word_embeddings": "false"},
    ],
    ids=lambda field: "-".join(field),
)
def test_field_that_changes_the_maths_is_named(refusal: Refusal, model: Path, field: dict[str, Any]) -> None:
    edit_json(model / "config.json", **field)
    sentence = refusal()
    assert sentence.startswith(f"{model}/config.json: ") and next(iter(field)) in sentence


@pytest.mark.parametrize("rope", [{"type": "default"}, {"rope_type": "default"}, None])
def test_rope_scaling_by_default_passes(model: Path, data: Path, tmp_path: Path, rope: dict[str, str] | None) -> None:
    edit_json(model / "config.json", rope_scaling=rope)
    check(model, data, tmp_path)


@pytest.mark.parametrize("name", ["max_position_embeddings", "rms_norm_eps", "rope_theta", "tie_word_embeddings"])
def test_null_means_the_default(model: Path, name: str) -> None:
    edit_json(model / "config.json", **{name: None}, rope_parameters=None)
    shape = check_model(model)
    assert (shape.max_positions, shape.norm_eps, shape.rope_base) >= (1, 0.0, 1.0)


def test_longer_sequences_than_a_sliding_window_are_refused(data: Path, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "mistral", family="mistral", sliding_window=64)
    check(model, data, tmp_path, "--max-response-length", "32")
    with pytest.raises(SettingsError, match="= 65 is more than the 64 positions .* sliding_window"):
        check(model, data, tmp_path, "--max-response-length", "33")


def test_kv_cache_that_does_not_hold_one_sequence_is_refused(refusal: Refusal) -> None:
    words = refusal("--rollout-kv-cache-gb", "1e-6")
    assert "--rollout-kv-cache-gb 1e-06 does not hold the keys and values of one sequence of" in words
