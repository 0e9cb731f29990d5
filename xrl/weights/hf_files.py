"""Hugging Face checkpoint folders: read tensors by slices, write whole folders atomically."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from xrl.config import SettingsError
from xrl.config.json_file import read_json_object
from xrl.files.atomic_folder import atomic_folder
from xrl.models.checks import checked_shape
from xrl.models.shape import ModelShape
from xrl.types import WeightBucket
from xrl.weights.other_files import copy_other_files
from xrl.weights.weight_files import INDEX_FILE, MAX_SHARD_BYTES, SINGLE_FILE, weight_map

# Number formats that weights are kept in, as safetensors names them; others hold quantised weights.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_checked_shape(folder: Path) -> ModelShape:
    """The shape of a checkpoint, once every key of its config.json is understood.

    Raises:
        SettingsError: it cannot be read, or says what we do not know.
    """
    file = folder / "config.json"
    config = read_json_object(file)
    return checked_shape(config, file)


class HuggingFaceReader:
    """Reads slices of a checkpoint's tensors; only the bytes asked for are read from disk.

    Raises:
        SettingsError: there are no weights, or their index is damaged.
    """

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = model_dir
        self._files = weight_map(model_dir)
        self._open: dict[str, Any] = {}

    def __enter__(self) -> HuggingFaceReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.clear()

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and number format of every tensor, from the files' headers.

        Raises:
            SettingsError: a file is missing or damaged, or holds numbers in a format that weights are not kept in.
        """
        found = {}
        for file in [SINGLE_FILE] if self._files is None else sorted(set(self._files.values())):
            try:
                handle = self._handle(file)
            except (OSError, SafetensorError) as error:
                raise SettingsError(f"{self.model_dir / file} is missing, truncated or corrupt: {error}") from error
            for name in handle.keys():  # noqa: SIM118 (a safetensors handle is no dict)
                if self._files is not None and self._files.get(name) != file:
                    raise SettingsError(
                        f"{self.model_dir / file} holds {name}, but {INDEX_FILE} says that "
                        f"{self._files.get(name, 'no file')} does"
                    )
                view = handle.get_slice(name)
                if view.get_dtype() not in _DTYPES:
                    raise SettingsError(
                        f"{self.model_dir / file}: {name} has number format {view.get_dtype()}, one of "
                        f"{', '.join(_DTYPES)} is needed"
                    )
                found[name] = (tuple(view.get_shape()), _DTYPES[view.get_dtype()])
        return found

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Rows [start, stop) along `dim` of a tensor.

        Raises:
            SettingsError: no such tensor in the checkpoint.
        """
        file = SINGLE_FILE if self._files is None else self._files.get(name)
        if file is None:
            raise SettingsError(f"{self.model_dir / INDEX_FILE} names no tensor {name}, which the model needs")
        handle = self._handle(file)
        if self._files is None and name not in handle.keys():  # noqa: SIM118 (a safetensors handle is no dict)
            raise SettingsError(f"{self.model_dir / file} holds no tensor {name}, which the model needs")
        view = handle.get_slice(name)
        return view[start:stop] if dim == 0 else view[:, start:stop]

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            if not (self.model_dir / file).is_file():  # the library would wait for whoever writes to a pipe
                raise SettingsError(f"{self.model_dir / file} is missing, truncated or corrupt: there is no such file")
            self._open[file] = safe_open(self.model_dir / file, framework="pt")
        return self._open[file]


def write_hf_folder(
    target: Path,
    buckets: Iterable[WeightBucket],
    *,
    source: Path,
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a folder that `from_pretrained` loads: weights as they stream in, the rest copied from `source`.

    The folder appears under its name when it is whole, or not at all; one that stands there already is an error.

    Raises:
        FileExistsError: `target` exists.
        OSError, SafetensorError: it cannot be written.
    """
    with atomic_folder(target) as partial:
        _write_weights(partial, buckets, dtype, max_shard_bytes)
        copy_other_files(source, partial, str(dtype).removeprefix("torch."))


def _write_weights(folder: Path, buckets: Iterable[WeightBucket], dtype: torch.dtype, max_shard_bytes: int) -> None:
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    pending_bytes = total_bytes = 0

    def flush() -> None:
        nonlocal pending, pending_bytes
        save_file(pending, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(pending))
        pending, pending_bytes = {}, 0

    for bucket in buckets:
        for name, tensor in bucket.tensors.items():
            num_bytes = tensor.numel() * dtype.itemsize
            if pending and pending_bytes + num_bytes > max_shard_bytes:
                flush()
            # A copy: the stream may reuse its buffers for the next layer.
            pending[name] = tensor.detach().to("cpu", dtype, copy=True).contiguous()
            pending_bytes += num_bytes
            total_bytes += num_bytes
    flush()
    files = _shard_names(len(shards))
    for number, file in enumerate(files):
        (folder / f"shard-{number}").rename(folder / file)
    _write_index(folder, dict(zip(files, shards, strict=True)), total_bytes)


def _shard_names(num_shards: int) -> list[str]:
    if num_shards == 1:
        return [SINGLE_FILE]
    return [f"model-{number + 1:05d}-of-{num_shards:05d}.safetensors" for number in range(num_shards)]


def _write_index(folder: Path, shards: Mapping[str, Iterable[str]], total_bytes: int) -> None:
    """Say which file holds which tensor, where there are several.

    For a single file no index is written: it would say something old once somebody saves another one in its place.
    """
    if len(shards) == 1:
        return
    files = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(files.items()))}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def write_safetensors(
    folder: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    read: Callable[[str], Tensor],
    *,
    max_shard_bytes: int,
) -> None:
    """Write a checkpoint's weights, its index too where it has several files; one tensor at a time is in memory.

    Args:
        tensors: name -> shape, number format.
        read: gives a whole tensor by its name; called once for each, in order.
    """
    shards: list[list[str]] = [[]]
    filled = total = 0
    for name, (shape, dtype) in tensors.items():
        num_bytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and filled + num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += num_bytes
        total += num_bytes
    files = _shard_names(len(shards))
    for file, names in zip(files, shards, strict=True):
        _write_shard(folder / file, {name: tensors[name] for name in names}, read)
    _write_index(folder, dict(zip(files, shards, strict=True)), total)


def _write_shard(
    file: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], read: Callable[[str], Tensor]
) -> None:
    """One safetensors file: the length of the header, the header, the data."""
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in tensors:
            stream.write(raw_bytes(read(name)))


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's content, without a copy where it is contiguous."""
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
