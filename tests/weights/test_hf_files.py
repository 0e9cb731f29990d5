"""Hugging Face folders are written whole or not at all, and read by slices."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny_models import make_checkpoint
from xrl.config import SettingsError
from xrl.types import WeightBucket
from xrl.weights.hf_files import HuggingFaceReader, write_hf_folder
from xrl.weights.weight_files import INDEX_FILE, SINGLE_FILE


def buckets_of(folder: Path) -> Iterator[WeightBucket]:
    """The tensors of a checkpoint, one bucket each."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight" or not model.config.tie_word_embeddings:
            yield WeightBucket(version=0, part=name, tensors={name: tensor})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("max_shard_bytes", [2**30, 20_000])
def test_written_folder_loads_with_the_same_weights(tied: bool, max_shard_bytes: int, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", tied=tied)
    target = tmp_path / "hf-final"
    write_hf_folder(target, buckets_of(source), source=source, dtype=torch.float32, max_shard_bytes=max_shard_bytes)
    left, right = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (source, target))
    for name, tensor in left.state_dict().items():
        assert torch.equal(tensor, right.state_dict()[name])
    assert AutoTokenizer.from_pretrained(target).get_vocab() == AutoTokenizer.from_pretrained(source).get_vocab()
    files = {path.name for path in target.glob("*.safetensors")}
    if max_shard_bytes == 2**30:
        assert files == {SINGLE_FILE} and not (target / INDEX_FILE).exists()
    else:
        assert set(json.loads((target / INDEX_FILE).read_text())["weight_map"].values()) == files
        assert len(files) > 1
    assert json.loads((target / "config.json").read_text())["dtype"] == "float32"


def test_failure_half_way_leaves_no_folder_that_loads(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")

    def failing() -> Iterator[WeightBucket]:
        yield next(buckets_of(source))
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_hf_folder(tmp_path / "hf-1", failing(), source=source, dtype=torch.float32)
    assert list(tmp_path.glob("*hf-1*")) == []
    # Nor is the next try hindered by what a killed one left.
    (tmp_path / ".hf-1.partial").mkdir()
    write_hf_folder(tmp_path / "hf-1", buckets_of(source), source=source, dtype=torch.bfloat16)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf-1").dtype == torch.bfloat16


def test_folder_that_exists_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "hf-1").mkdir()
    with pytest.raises(FileExistsError, match="hf-1"):
        write_hf_folder(tmp_path / "hf-1", [], source=tmp_path, dtype=torch.float32)


@pytest.mark.parametrize("max_shard_bytes", [None, 20_000])
def test_reader_gives_slices_of_whole_and_sharded_checkpoints(max_shard_bytes: int | None, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path, max_shard_bytes=max_shard_bytes)
    whole = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).get_parameter("model.embed_tokens.weight")
    with HuggingFaceReader(source) as reader:
        assert torch.equal(reader.read("model.embed_tokens.weight", 0, 3, 9), whole[3:9])
        assert torch.equal(reader.read("model.embed_tokens.weight", 1, 2, 5), whole[:, 2:5])
        with pytest.raises(SettingsError, match="no tensor model.nothing"):
            reader.read("model.nothing", 0, 0, 1)


def test_an_export_that_is_saved_again_in_place_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    for max_shard_bytes in (2**30, 60_000):
        target = tmp_path / f"hf-{max_shard_bytes}"
        write_hf_folder(target, buckets_of(source), source=source, dtype=torch.float32, max_shard_bytes=max_shard_bytes)
        model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
        with torch.no_grad():
            model.get_parameter("model.norm.weight").mul_(3)
        model.save_pretrained(target)
        with HuggingFaceReader(target) as reader:
            assert torch.equal(reader.read("model.norm.weight", 0, 0, 64), model.get_parameter("model.norm.weight"))


def test_further_chat_templates_travel_along(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    write_hf_folder(tmp_path / "target", buckets_of(source), source=source, dtype=torch.float32)
    templates = AutoTokenizer.from_pretrained(tmp_path / "target").chat_template
    assert templates == {**AutoTokenizer.from_pretrained(source).chat_template, "rag": "{{ messages }}"}
