"""Hugging Face checkpoint folders: read tensors by slices, write whole folders atomically."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from xrl.config import SettingsError
from xrl.models.checks import checked_shape
from xrl.models.shape import ModelShape
from xrl.types import WeightBucket

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# Weights of the source checkpoint, in any format: never copied into an export.
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".index.json")

# In a folder that is being written: whose it is.
_LOCK_FILE = "xrl-writes-here"

# Number formats that weights are kept in, as safetensors names them; others hold quantised weights.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_checked_shape(folder: Path) -> ModelShape:
    """The shape of a checkpoint, once every key of its config.json is understood.

    Raises:
        SettingsError: it cannot be read, or says what we do not know.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise SettingsError(f"{file} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise SettingsError(f"{file} needs a JSON object, found a {type(config).__name__}")
    return checked_shape(config, file)


class HuggingFaceReader:
    """Reads slices of a checkpoint's tensors; only the bytes asked for are read from disk.

    Raises:
        SettingsError: the index is damaged.
    """

    def __init__(self, model_dir: Path) -> None:
        self.model_dir = model_dir
        index = model_dir / INDEX_FILE
        self._files: dict[str, str] | None = None
        if index.exists():
            try:
                self._files = dict(json.loads(index.read_text())["weight_map"])
                if not all(isinstance(file, str) for file in self._files.values()):
                    raise ValueError("files must be names")
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise SettingsError(f"{index} has no weight_map from tensors to files: {error!r}") from error
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
            self._open[file] = safe_open(self.model_dir / file, framework="pt")
        return self._open[file]


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which appears under its name when all is written and flushed, or not at all.

    What a killed process leaves has another name, and is removed by the next try; nothing else is.

    Raises:
        FileExistsError: `target` exists, something of somebody else's has the other name, or another process writes
            there.
    """
    if os.path.lexists(target):
        raise FileExistsError(f"{target} exists already")
    partial = target.with_name(f".{target.name}.partial")
    lock = partial / _LOCK_FILE
    if os.path.lexists(partial) and not lock.is_file() and not (partial.is_dir() and not any(partial.iterdir())):
        raise FileExistsError(f"{partial} is in the way, and not ours to remove")
    partial.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise FileExistsError(f"another process writes {target}, in {partial}") from error
        try:
            for leftover in partial.iterdir():
                if leftover != lock:
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            yield partial
            lock.unlink()
            for path in [*partial.rglob("*"), partial]:
                _flush(path)
            os.rename(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    _flush(target.parent)


def write_hf_folder(
    target: Path,
    buckets: Iterable[WeightBucket],
    *,
    source: Path,
    dtype: torch.dtype,
    max_shard_bytes: int = 4 * 2**30,
) -> None:
    """Write a folder that `from_pretrained` loads: weights as they stream in, the rest copied from `source`.

    The folder appears under its name when it is whole, or not at all; one that stands there already is an error.

    Raises:
        FileExistsError: `target` exists.
    """
    with atomic_folder(target) as partial:
        _write_weights(partial, buckets, dtype, max_shard_bytes)
        copy_other_files(source, partial, dtype)


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
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
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
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        is_single = len(shards) == 1
        file = SINGLE_FILE if is_single else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / file, {name: tensors[name] for name in names}, read)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


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


def copy_other_files(source: Path, target: Path, dtype: torch.dtype | None = None) -> None:
    """Configuration, tokenizer, chat template, licence: everything that is not weights.

    Args:
        dtype: what config.json is to say of the weights; None: what it says already.
    """
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(_WEIGHT_SUFFIXES) and not file.name.startswith("."):
            shutil.copyfile(file, target / file.name)
    if dtype is None:
        return
    config = json.loads((source / "config.json").read_text())
    # transformers 5 says "dtype", older checkpoints "torch_dtype".
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prune_hf_folders(folder: Path, *, keep: int) -> None:
    """Remove the oldest `hf-<step>` folders below `folder` but for the newest `keep`; `hf-final` stays."""
    steps = sorted(int(path.name[3:]) for path in folder.glob("hf-*") if path.name[3:].isdigit())
    for step in steps[: max(0, len(steps) - keep)]:
        shutil.rmtree(folder / f"hf-{step}")
