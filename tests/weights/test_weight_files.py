"""The weights that are read are those that transformers reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.tiny_models import make_checkpoint
from xrl.config import SettingsError
from xrl.models.shape import read_model_shape
from xrl.preflight.weights import check_weights
from xrl.weights.hf_files import HuggingFaceReader
from xrl.weights.weight_files import INDEX_FILE, SINGLE_FILE, is_weights, weight_map

NORM = "model.norm.weight"


def read_norm(folder: Path) -> torch.Tensor:
    check_weights(folder, read_model_shape(folder))
    with HuggingFaceReader(folder) as reader:
        return reader.read(NORM, 0, 0, 64)


@pytest.mark.parametrize("shards", ["there", "gone"])
def test_a_single_file_goes_before_an_older_index(shards: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, max_shard_bytes=100_000)
    newer = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    newer = {name: (tensor * 1.5).clone() for name, tensor in newer.items() if name != "lm_head.weight"}
    for file in tmp_path.glob("model-*.safetensors") if shards == "gone" else ():
        file.unlink()
    save_file(newer, tmp_path / SINGLE_FILE, metadata={"format": "pt"})
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).get_parameter(NORM)
    assert torch.equal(read_norm(tmp_path), expected)
    assert torch.equal(expected, newer[NORM])


def test_a_variant_and_shards_without_an_index_are_not_read(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    tensors = load_file(tmp_path / SINGLE_FILE)
    for name in ("model.fp16.safetensors", "model-00001-of-00001.safetensors", "adapter_model.safetensors"):
        save_file({NORM: torch.zeros(64)}, tmp_path / name)
    assert torch.equal(read_norm(tmp_path), tensors[NORM])


@pytest.mark.parametrize("file", ["../model-1.safetensors", "/tmp/model-1.safetensors", "a/../../x.safetensors"])
def test_shards_lie_in_the_folder(file: str, tmp_path: Path) -> None:
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {NORM: file}}))
    with pytest.raises(SettingsError, match="but shards must lie in the folder itself"):
        weight_map(tmp_path)


def test_an_index_behind_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / INDEX_FILE).write_bytes(b'\xef\xbb\xbf{"weight_map": {"a": "model-1.safetensors"}}')
    assert weight_map(tmp_path) == {"a": "model-1.safetensors"}


def test_a_folder_without_weights_says_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="needs model.safetensors or .* with its shards, found no weights"):
        weight_map(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(SettingsError, match=r"found pytorch_model\.bin"):
        HuggingFaceReader(tmp_path)


def test_an_adapter_beside_the_weights_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(SettingsError, match=r"has an adapter_config\.json, .* merge it into them"):
        read_norm(tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.safetensors", True),
        ("model-00001-of-00002.safetensors", True),
        ("model.safetensors.index.json", True),
        ("model.safetensors.index.fp16.json", True),
        ("model.safetensors.bak", True),
        ("pytorch_model.bin", True),
        ("pytorch_model.bin.index.json", True),
        ("consolidated.00.pth", True),
        ("optimizer.pt", True),
        ("Model-Q4.GGUF", True),
        ("model.onnx_data", True),
        ("tf_model.h5", True),
        ("tokenizer.model", False),
        ("tokenizer.json", False),
        ("README.pt.md", False),
        ("params.json", False),
        ("chat_template.jinja", False),
        ("binary.txt", False),
    ],
)
def test_weights_are_told_by_their_names(name: str, expected: bool) -> None:
    assert is_weights(name) == expected
