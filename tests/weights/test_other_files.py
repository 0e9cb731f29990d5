"""All that lies beside a model's weights travels along; what does not is named."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from xrl.weights.other_files import MAX_FOLDER_BYTES, copy_other_files, find_other_files


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{{}} {name}" if name != "config.json" else "{}")
    return folder


def names_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


KEPT = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates/rag.jinja",
    "additional_chat_templates/tool_use.jinja",
    "LICENSE",
    "README.md",
    "modeling_custom.py",
    "figures/one/plot.png",
)
OWN = ("model.safetensors", "model.safetensors.index.json", "model-00001-of-00002.safetensors")


def test_folders_and_files_are_copied_and_weights_are_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = fill(tmp_path / "source", *KEPT, *OWN, "original/params.json", "original/consolidated.00.pth")
    fill(source, "optimizer.pt", "onnx/model.onnx", "onnx/config.json", ".git/config", ".cache/x", "__pycache__/a.pyc")
    (source / "nowhere").symlink_to(tmp_path / "absent")
    (source / "elsewhere").symlink_to(tmp_path)
    os.mkfifo(source / "pipe")
    target = tmp_path / "target"
    target.mkdir()
    with caplog.at_level(logging.WARNING, logger="xrl"):
        copy_other_files(source, target)
    assert names_in(target) == set(KEPT)
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.endswith(": elsewhere, nowhere, onnx, optimizer.pt, original, pipe")
    assert (target / "figures/one/plot.png").read_text() == "{} figures/one/plot.png"


def test_a_folder_of_a_model_alone_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = fill(tmp_path / "source", *KEPT, *OWN, ".gitattributes")
    (tmp_path / "target").mkdir()
    with caplog.at_level(logging.WARNING, logger="xrl"):
        copy_other_files(source, tmp_path / "target")
    assert not caplog.records


def test_many_that_are_left_out_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = fill(tmp_path / "source", *(f"part-{number}.bin" for number in range(20)))
    (tmp_path / "target").mkdir()
    with caplog.at_level(logging.WARNING, logger="xrl"):
        copy_other_files(source, tmp_path / "target")
    assert "part-0.bin" in caplog.text and "and 12 more" in caplog.text


def test_links_to_files_are_followed_as_the_hub_s_cache_needs(tmp_path: Path) -> None:
    blobs = fill(tmp_path / "blobs", "a1", "b2")
    source = fill(tmp_path / "snapshots" / "main" / "additional_chat_templates").parent
    (source / "additional_chat_templates").mkdir(parents=True)
    (source / "tokenizer.json").symlink_to("../../blobs/a1")
    (source / "additional_chat_templates" / "rag.jinja").symlink_to("../../../blobs/b2")
    target = tmp_path / "target"
    target.mkdir()
    copy_other_files(source, target)
    assert (target / "tokenizer.json").read_text() == (blobs / "a1").read_text()
    assert not (target / "additional_chat_templates" / "rag.jinja").is_symlink()


def test_large_folders_are_no_part_of_a_model(tmp_path: Path) -> None:
    source = fill(tmp_path / "source", "config.json", "data/train.jsonl")
    os.truncate(source / "data" / "train.jsonl", MAX_FOLDER_BYTES + 1)
    found = find_other_files(source, target=tmp_path / "target")
    assert (found.copied, found.left_out) == ((source / "config.json",), (source / "data",))
    assert found.num_bytes() == 2


def test_what_is_written_below_the_model_s_folder_is_not_copied_into_itself(tmp_path: Path) -> None:
    source = fill(tmp_path / "source", "config.json", "work/run/logs/worker.log")
    target = source / "work" / "run" / "hf-final"
    target.mkdir()
    copy_other_files(source, target)
    assert names_in(target) == {"config.json"}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"dtype": "bfloat16"}, {"dtype": "float32"}),
        ({"torch_dtype": "bfloat16"}, {"torch_dtype": "float32"}),
        ({"torch_dtype": "float16", "dtype": "bfloat16"}, {"torch_dtype": "float32", "dtype": "float32"}),
        ({}, {"dtype": "float32"}),
        (
            {"dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16", "x": [1]}},
            {"dtype": "float32", "text_config": {"torch_dtype": "float32", "x": [1]}},
        ),
        (
            {"dtype": "bfloat16", "transformers.js_config": {"dtype": "q4", "kv_cache_dtype": {"q4": "float16"}}},
            {"dtype": "float32", "transformers.js_config": {"dtype": "q4", "kv_cache_dtype": {"q4": "float16"}}},
        ),
    ],
)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_every_number_format_in_the_configuration_is_what_is_written(
    before: dict[str, object], after: dict[str, object], mark: bytes, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes(mark + json.dumps(before).encode())
    target = tmp_path / "target"
    target.mkdir()
    copy_other_files(tmp_path, target, "float32")
    assert json.loads((target / "config.json").read_text()) == after


def test_json_is_copied_without_its_byte_order_mark_and_all_else_to_the_byte(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for name in ("generation_config.json", "README.md", "empty.json"):
        (source / name).write_bytes(b"\xef\xbb\xbf{}\r\n" if name != "empty.json" else b"")
    copy_other_files(source, target)
    assert (target / "generation_config.json").read_bytes() == b"{}\r\n"
    assert (target / "README.md").read_bytes() == b"\xef\xbb\xbf{}\r\n"
    assert (target / "empty.json").read_bytes() == b""
