"""safetensors files, by their headers alone: whole, and with every tensor the model needs in its shape.

A file is 8 bytes (the header's length, little-endian), a JSON header (name -> dtype, shape, place in the data) and the
data.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from xrl.config import SettingsError
from xrl.config.files import open_regular
from xrl.config.json_file import parse_json
from xrl.models.shape import ModelShape
from xrl.weights.plan import is_recomputed, part_names, tensor_shapes
from xrl.weights.weight_files import INDEX_FILE, SINGLE_FILE, weight_map

ADAPTER_FILE = "adapter_config.json"

# Number formats that we load, with their bytes; others hold quantised weights.
_DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# The format's own limit: a longer header is a damaged length.
_MAX_HEADER_BYTES = 100_000_000
# Read of a file at a time.
_COMPARED_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor as the header of its file describes it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int  # of its data in the file
    num_bytes: int


def check_weights(folder: Path, shape: ModelShape) -> None:
    """Refuse a checkpoint that cannot be loaded, without reading its data.

    Raises:
        SettingsError: a file is missing, truncated or corrupt; a tensor is missing, of another shape, or has no place
            in the model; or an adapter lies beside them.
    """
    if (folder / ADAPTER_FILE).is_file():
        raise SettingsError(
            f"{folder} has an {ADAPTER_FILE}, and transformers would add that adapter to the weights: merge it into "
            f"them, or take it out of the folder"
        )
    files = weight_map(folder)
    source = folder / (SINGLE_FILE if files is None else INDEX_FILE)
    stored = read_header(source) if files is None else _read_sharded(source, files)
    expected = set()
    # Part by part: a damaged config.json may describe more of them than there is room for.
    for name, needed in (size for part in part_names(shape) for size in tensor_shapes(shape, part).items()):
        expected.add(name)
        tensor = stored.get(name)
        if tensor is None:
            hint = " (config.json: tie_word_embeddings is false)" if name == "lm_head.weight" else ""
            raise SettingsError(f"{source} has no tensor {name}, which the model needs{hint}")
        if tensor.shape != needed:
            raise SettingsError(
                f"{tensor.file}: {name} has shape {list(tensor.shape)}, config.json needs {list(needed)}"
            )
        if tensor.dtype not in _DTYPE_BYTES:
            raise SettingsError(
                f"{tensor.file}: {name} has number format {tensor.dtype}, one of {', '.join(_DTYPE_BYTES)} is needed"
            )
    for name in stored.keys() - expected:
        _check_surplus(name, stored, shape)


def _check_surplus(name: str, stored: Mapping[str, StoredTensor], shape: ModelShape) -> None:
    """A tensor that the model has no place for would be missing from the trained one: it is refused.

    But for a tied head that is stored all the same, and for what config.json gives.
    """
    if is_recomputed(name):
        return
    tensor = stored[name]
    if name == "lm_head.weight" and shape.tied_embeddings:
        if not _equal(tensor, stored["model.embed_tokens.weight"]):
            raise SettingsError(
                f"{tensor.file}: {name} differs from model.embed_tokens.weight, but config.json ties the two "
                f"(tie_word_embeddings)"
            )
        return
    raise SettingsError(f"{tensor.file}: tensor {name} has no place in {shape.architecture}, and would be lost")


def _equal(left: StoredTensor, right: StoredTensor) -> bool:
    """Whether two tensors are the same, byte by byte."""
    if (left.dtype, left.shape, left.num_bytes) != (right.dtype, right.shape, right.num_bytes):
        return False
    with left.file.open("rb") as one, right.file.open("rb") as other:
        one.seek(left.start)
        other.seek(right.start)
        for done in range(0, left.num_bytes, _COMPARED_BYTES):
            count = min(_COMPARED_BYTES, left.num_bytes - done)
            if one.read(count) != other.read(count):
                return False
    return True


def read_header(file: Path) -> dict[str, StoredTensor]:
    """What a safetensors file says it holds, checked against its size.

    Raises:
        SettingsError: the file is truncated or no safetensors file.
    """
    try:
        with open_regular(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            header_bytes = int.from_bytes(stream.read(8), "little")
            is_plausible = 2 <= header_bytes <= min(size - 8, _MAX_HEADER_BYTES)
            header = parse_json(stream.read(header_bytes)) if is_plausible else None
    except OSError as error:
        raise SettingsError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError:  # not JSON, or not UTF-8
        header = None
    if not isinstance(header, dict):
        raise SettingsError(
            f"{file} ({size:,} bytes) is corrupt or no safetensors file: its header cannot be read; fetch it again"
        )
    header.pop("__metadata__", None)
    try:
        stored = {name: _stored(file, entry, 8 + header_bytes) for name, entry in header.items()}
        data_bytes = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise SettingsError(f"{file} is corrupt: its header does not describe tensors; fetch it again") from error
    expected = 8 + header_bytes + data_bytes
    if size != expected:
        problem = "is truncated" if size < expected else "is corrupt"
        raise SettingsError(f"{file} {problem}: it has {size:,} bytes, its header needs {expected:,}; fetch it again")
    _check_as_loaded(file)
    return stored


def _check_as_loaded(file: Path) -> None:
    """Let the reader that will load the file look at its header, too: it is stricter than ours."""
    try:
        with safe_open(file, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise SettingsError(f"{file} is corrupt: {error}; fetch it again") from error


def _stored(file: Path, entry: Mapping[str, Any], data: int) -> StoredTensor:
    start, end = entry["data_offsets"]
    tensor = StoredTensor(
        file=file, dtype=entry["dtype"], shape=tuple(entry["shape"]), start=data + start, num_bytes=end - start
    )
    itemsize = _DTYPE_BYTES.get(tensor.dtype)
    if itemsize is not None and end - start != itemsize * math.prod(tensor.shape):
        raise ValueError("the bytes of a tensor do not fit its shape")
    return tensor


def _read_sharded(index: Path, files: Mapping[str, str]) -> dict[str, StoredTensor]:
    headers: dict[str, dict[str, StoredTensor]] = {}
    for shard in sorted(set(files.values())):
        file = index.parent / shard
        if not file.is_file():
            raise SettingsError(f"{index} names the shard {shard}, which is not in {index.parent}: fetch it")
        headers[shard] = read_header(file)
    for name, shard in files.items():
        if name not in headers[shard]:
            raise SettingsError(f"{index} says that {shard} holds {name}, but it does not")
    return {name: headers[shard][name] for name, shard in files.items()}
