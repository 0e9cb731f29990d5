"""What TurboMind is sent: models that it would compute otherwise, and parts that are not whole, are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.rollout.engines import buckets
from tests.rollout.test_contract import tiny_model
from tests.tiny_models import make_checkpoint
from xrl.config import SettingsError
from xrl.models.families import FAMILIES
from xrl.models.shape import read_model_shape
from xrl.rollout.engine import EngineError
from xrl.rollout.turbomind_tensors import ARCHITECTURES, check_part, expected_parts, supported_shape


def write_config(folder: Path, architecture: str = "Qwen3ForCausalLM", **changes: Any) -> Path:
    config = tiny_model(0).config.to_dict() | {"architectures": [architecture]}
    if architecture in FAMILIES:
        config["model_type"] = FAMILIES[architecture].model_type
    if architecture in ("LlamaForCausalLM", "MistralForCausalLM"):
        for name in ("use_sliding_window", "sliding_window", "max_window_layers"):  # keys of Qwen's
            del config[name]
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "GptOssForCausalLM"}, "runs LlamaForCausalLM, .*, found GptOssForCausalLM"),
        ({"head_dim": 16}, "needs a head_dim of 64, 128, 256, found head_dim 16"),
        ({"architecture": "LlamaForCausalLM", "attention_bias": True}, "needs no biases in the attention"),
        ({"architecture": "Qwen2ForCausalLM"}, "needs an attention as wide as the hidden state, found 4 heads of 64"),
        ({"architecture": "LlamaForCausalLM", "mlp_bias": True}, "needs no biases in the MLP"),
        ({"architecture": "MistralForCausalLM", "sliding_window": 48}, "needs full attention, found sliding_window 48"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"logit_softcap": 30.0}, "logit_softcap is 30.0, which xrl does not know"),
        ({"max_position_embeddings": 32}, "needs at least 64 positions, found max_position_embeddings 32"),
    ],
)
def test_models_that_turbomind_would_compute_otherwise_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write_config(tmp_path, **changes)
    with pytest.raises(SettingsError, match=message):
        supported_shape(tmp_path, max_model_len=64)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_expected_tensors_are_those_of_transformers(tmp_path: Path, family: str, tied: bool) -> None:
    make_checkpoint(tmp_path, family=family, tied=tied, with_tokenizer=False)
    parts = expected_parts(read_model_shape(tmp_path))
    for bucket in buckets(AutoModelForCausalLM.from_pretrained(tmp_path)):
        check_part(bucket.part, bucket.tensors, parts)
        assert bucket.tensors.keys() == parts.pop(bucket.part).keys()
    assert not parts


def test_a_part_must_be_whole(tmp_path: Path) -> None:
    parts = expected_parts(supported_shape(write_config(tmp_path), max_model_len=64))
    tensors = dict(buckets(tiny_model(0))[1].tensors)
    tensors.pop("model.layers.0.mlp.up_proj.weight")
    with pytest.raises(EngineError, match=r"layers\.0: TurboMind takes only whole parts, missing .*up_proj\.weight"):
        check_part("layers.0", tensors, parts)
    with pytest.raises(EngineError, match=r"layers\.7: the model has no such part"):
        check_part("layers.7", tensors, parts)


def test_names_and_sizes_are_those_of_the_part(tmp_path: Path) -> None:
    parts = expected_parts(supported_shape(write_config(tmp_path), max_model_len=64))
    assert list(parts) == ["embeddings", "layers.0", "layers.1", "final"]
    final = dict(buckets(tiny_model(0))[-1].tensors)
    check_part("final", final, parts)
    with pytest.raises(EngineError, match=r"weight update, final: the model has no tensor 'model\.norm\.bias' there"):
        check_part("final", final | {"model.norm.bias": torch.ones(64)}, parts)
    with pytest.raises(EngineError, match=r"weight update, layers\.0: the model has no tensor '.*' there"):
        check_part("layers.0", final, parts)
    with pytest.raises(EngineError, match=r"final: model\.norm\.weight must be of size \[64\], got \[1, 64\]"):
        check_part("final", final | {"model.norm.weight": torch.ones(1, 64)}, parts)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_architecture_of_the_table_is_one_that_xrl_trains(architecture: str) -> None:
    assert architecture in FAMILIES


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 48, "use_sliding_window": False},  # Qwen has both keys
        {"architecture": "MistralForCausalLM", "sliding_window": 64},
        {"max_position_embeddings": 64},
        {"architecture": "Qwen2ForCausalLM", "hidden_size": 256},
    ],
)
def test_what_changes_nothing_for_the_run_is_taken(tmp_path: Path, changes: dict[str, Any]) -> None:
    shape = supported_shape(write_config(tmp_path, **changes), max_model_len=64)
    assert shape.head_dim == 64


def test_a_config_without_an_architecture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SettingsError, match="engine turbomind runs LlamaForCausalLM, .*, found none"):
        supported_shape(tmp_path, max_model_len=64)
