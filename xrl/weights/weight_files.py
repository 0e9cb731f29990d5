"""Which files of a Hugging Face folder hold its weights: the choice that transformers makes. Torch-free."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from xrl.config import SettingsError
from xrl.config.json_file import read_json_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Of each file that we write, unless a single tensor is larger.
MAX_SHARD_BYTES = 4 * 2**30

# Tensors, optimizer states and their indexes, of any framework, under their own name or as a copy (`.bak`, `.part`).
_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pth|ckpt|gguf|ggml|h5|msgpack|onnx|onnx_data|distcp|nemo|npz)(\.|$)|\.(pt|ot|tflite)$",
    re.IGNORECASE,
)
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights or says where they are."""
    return _WEIGHTS.search(name) is not None


def is_own(name: str) -> bool:
    """Whether a file of this name holds, or indexes, the weights that we read and write."""
    return name in (SINGLE_FILE, INDEX_FILE) or _SHARD.fullmatch(name) is not None


def weight_map(folder: Path) -> dict[str, str] | None:
    """Tensor -> file that holds it, as the index says; None: all of them are in `model.safetensors`.

    Like transformers we take that one file where it is there: an index beside it is older, and so are its shards.

    Raises:
        SettingsError: there are no weights, or the index does not say where they are.
    """
    if (folder / SINGLE_FILE).is_file():
        return None
    index = folder / INDEX_FILE
    if not index.is_file():
        others = sorted(path.name for path in folder.iterdir() if is_weights(path.name))
        found = f"found {', '.join(others[:3])}" if others else "found no weights"
        raise SettingsError(f"{folder} needs {SINGLE_FILE} or {INDEX_FILE} with its shards, {found}")
    found_map = read_json_object(index).get("weight_map")
    if not isinstance(found_map, dict) or not all(isinstance(file, str) for file in found_map.values()):
        raise SettingsError(f"{index} has no weight_map from tensors to files")
    for file in set(found_map.values()):
        path = PurePosixPath(file)
        if path.is_absolute() or ".." in path.parts:
            raise SettingsError(f"{index} names the shard {file!r}, but shards must lie in the folder itself")
    return found_map
