"""Checkpoints are refused by their headers when a file or a tensor is missing or damaged."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.small_runs import Refusal, edit_json
from tests.tiny_models import make_checkpoint
from xrl.models.shape import read_model_shape
from xrl.preflight.weights import check_weights


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied Qwen2 in one file."""
    return make_checkpoint(tmp_path_factory.mktemp("single"), family="qwen2")


@pytest.fixture
def single_model(single: Path, model: Path) -> Path:
    shutil.rmtree(model)
    return Path(shutil.copytree(single, model))


def some_shard(model: Path) -> Path:
    shards = sorted(model.glob("model-*.safetensors"))
    assert len(shards) > 2
    return shards[1]


def test_folder_without_safetensors_says_what_it_has(refusal: Refusal, single_model: Path) -> None:
    (single_model / "model.safetensors").rename(single_model / "pytorch_model.bin")
    sentence = refusal()
    assert "needs model.safetensors" in sentence and "found pytorch_model.bin" in sentence


def test_missing_shard_is_named(refusal: Refusal, model: Path) -> None:
    shard = some_shard(model)
    shard.unlink()
    assert f"names the shard {shard.name}, which is not in {model}" in refusal()


def test_truncated_shard_is_named_with_both_sizes(refusal: Refusal, model: Path) -> None:
    shard = some_shard(model)
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-100])
    assert f"{shard} is truncated: it has {size - 100:,} bytes, its header needs {size:,}" in refusal()


def test_trailing_bytes_are_refused(refusal: Refusal, model: Path) -> None:
    shard = some_shard(model)
    shard.write_bytes(shard.read_bytes() + b"more")
    assert f"{shard} is corrupt" in refusal()


@pytest.mark.parametrize(
    "content",
    [b"", b"1234", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 100\n", b"\x02" + bytes(7) + b"[]"],
    ids=["empty", "four bytes", "git-lfs pointer", "list"],
)
def test_file_that_is_no_safetensors_is_refused(refusal: Refusal, single_model: Path, content: bytes) -> None:
    file = single_model / "model.safetensors"
    file.write_bytes(content)
    assert f"{file} ({len(content)} bytes) is corrupt or no safetensors file" in refusal()


def test_header_with_impossible_offsets_is_refused(refusal: Refusal, single_model: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}).encode()
    (single_model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert "its header does not describe tensors" in refusal()


def test_missing_tensor_is_named(refusal: Refusal, single_model: Path) -> None:
    file = single_model / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.2.self_attn.k_proj.bias"]
    save_file(tensors, file)
    assert f"{file} has no tensor model.layers.2.self_attn.k_proj.bias" in refusal()


def test_untied_model_needs_its_head(refusal: Refusal, single_model: Path) -> None:
    edit_json(single_model / "config.json", tie_word_embeddings=False)
    assert "has no tensor lm_head.weight" in refusal()


def test_tensor_without_a_place_is_refused(refusal: Refusal, single_model: Path) -> None:
    file = single_model / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "model.layers.0.self_attn.o_proj.bias": torch.zeros(64)}, file)
    assert (
        "tensor model.layers.0.self_attn.o_proj.bias has no place in Qwen2ForCausalLM, and would be lost" in refusal()
    )


def test_tied_head_may_be_stored_if_it_is_the_embedding(refusal: Refusal, single_model: Path) -> None:
    file = single_model / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors["model.embed_tokens.weight"]
    save_file(
        {**tensors, "lm_head.weight": embedding.clone(), "model.layers.0.rotary_emb.inv_freq": torch.ones(8)}, file
    )
    check_weights(single_model, read_model_shape(single_model))
    other = embedding.clone()
    other[-1, -1] += 1
    save_file({**tensors, "lm_head.weight": other}, file)
    assert "lm_head.weight differs from model.embed_tokens.weight, but config.json ties the two" in refusal()


def test_tensor_that_its_shard_lacks_is_named(refusal: Refusal, model: Path) -> None:
    shard = some_shard(model)
    tensors = load_file(shard)
    lost = sorted(tensors)[0]
    del tensors[lost]
    save_file(tensors, shard)
    assert f"says that {shard.name} holds {lost}, but it does not" in refusal()


def test_tensor_of_another_shape_is_named(refusal: Refusal, model: Path) -> None:
    edit_json(model / "config.json", vocab_size=99)
    sentence = refusal()
    assert "shape [98, 64]" in sentence and "needs [99, 64]" in sentence


def test_quantised_weights_are_refused(refusal: Refusal, single_model: Path) -> None:
    file = single_model / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, file)
    assert "model.norm.weight has number format I8" in refusal()


def test_index_without_a_weight_map_is_refused(refusal: Refusal, model: Path) -> None:
    (model / "model.safetensors.index.json").write_text("{}")
    assert "has no weight_map" in refusal()


@pytest.mark.parametrize("change", [{"shape": [64.0]}, {"__metadata__": {"format": 1}}, {"data_offsets": [0.0, 256.0]}])
def test_a_header_that_only_the_loading_library_refuses_is_refused(
    refusal: Refusal, single_model: Path, change: dict[str, object]
) -> None:
    file = single_model / "model.safetensors"
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    if "__metadata__" in change:
        header |= change
    else:
        norm = header["model.norm.weight"]
        norm |= {name: [float(number) for number in norm[name]] for name in change}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
    assert f"{file} is corrupt: " in refusal()


def test_a_shard_with_a_name_too_long_is_refused(refusal: Refusal, model: Path) -> None:
    index = model / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map=files | {"model.norm.weight": "a" * 300})
    assert "aaa cannot be read: File name too long" in refusal()


@pytest.mark.parametrize(
    "header", [b"[" * 5000, b'{"a":' * 5000, b'{"__metadata__": {}, "__metadata__": {}}', b"\xff\xfe{}"]
)
def test_a_header_that_cannot_be_read_is_refused(refusal: Refusal, model: Path, header: bytes) -> None:
    shard = some_shard(model)
    shard.write_bytes(len(header).to_bytes(8, "little") + header)
    assert f"{shard} ({len(header) + 8:,} bytes) is corrupt" in refusal()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../other.safetensors", "shards must lie in the folder itself"),
        ("/dev/zero", "shards must lie in the folder itself"),
        ("", "which is not in"),
        (".", "which is not in"),
        ("a\0b", "which is not in"),
        ("half \ud800", "which is not in"),
        ("x" * 5000, "File name too long"),
        ("\x1b[2J\nxrl: error: fake", "\\x1b[2J\\nxrl: error: fake"),
        (5, "has no weight_map from tensors to files"),
        (["a"], "has no weight_map from tensors to files"),
    ],
)
def test_odd_names_of_shards_are_one_sentence(refusal: Refusal, model: Path, name: object, words: str) -> None:
    index = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    index[next(iter(index))] = name
    edit_json(model / "model.safetensors.index.json", weight_map=index)
    sentence = refusal()
    assert words in sentence and sentence.isprintable()


def test_a_pipe_in_place_of_a_shard_is_not_waited_for(refusal: Refusal, model: Path) -> None:
    shard = some_shard(model)
    shard.unlink()
    os.mkfifo(shard)
    assert f"{shard} is a pipe: a file is needed" in refusal()
