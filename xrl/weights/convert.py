"""Checkpoints on disk: Hugging Face <-> Megatron at any layout, a parameter or a tensor at a time.

A source gives slices of Hugging Face tensors, whatever the folder's format; so every direction, Megatron at one layout
to Megatron at another included, is "read slices, write".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from xrl.config import SettingsError
from xrl.files.atomic_folder import atomic_folder
from xrl.models.shape import ModelShape
from xrl.weights.hf_files import HuggingFaceReader, read_checked_shape, write_safetensors
from xrl.weights.megatron_files import (
    HUGGINGFACE_FOLDER,
    MANIFEST_FILE,
    MegatronReader,
    RankFileWriter,
    file_places,
    parameter_dtype,
    rank_file,
    same_bytes,
    write_manifest,
)
from xrl.weights.other_files import copy_other_files
from xrl.weights.plan import ParameterPlan, Plan, TensorShape, is_recomputed, part_names, tensor_shapes
from xrl.weights.slices import fill, in_parameter, in_tensor
from xrl.weights.weight_files import MAX_SHARD_BYTES

# Told after each tensor how many bytes are done.
Progress = Callable[[int], object]


class Source(Protocol):
    """A checkpoint folder of either format."""

    folder: Path
    shape: ModelShape
    other_files: Path  # where config.json, tokenizer and so on are

    @property
    def tensors(self) -> Mapping[str, tuple[TensorShape, torch.dtype]]:
        """Hugging Face name -> shape, number format."""

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Rows [start, stop) along `dim` of a tensor."""


class HuggingFaceSource:
    """A Hugging Face folder.

    Raises:
        SettingsError: a tensor is missing, of another shape, or one that no mapping table knows.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = self.other_files = folder
        self.shape = read_checked_shape(folder)
        self._reader = HuggingFaceReader(folder)
        self.tensors = self._reader.tensors()
        expected = set()
        # Part by part: a damaged config.json may describe more of them than there is room for.
        for name, size in (size for part in part_names(self.shape) for size in tensor_shapes(self.shape, part).items()):
            expected.add(name)
            found = self.tensors.get(name)
            if found is None or found[0] != size:
                problem = "is missing" if found is None else f"has shape {list(found[0])}"
                raise SettingsError(f"{folder}: tensor {name} {problem}, shape {list(size)} is needed")
        for name in [name for name in self.tensors if name not in expected]:
            if not self._repeats_another(name):
                raise SettingsError(
                    f"{folder}: tensor {name} has no place in {self.shape.architecture}, and would be lost"
                )
            del self.tensors[name]

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Rows [start, stop) along `dim` of a tensor."""
        return self._reader.read(name, dim, start, stop)

    def _repeats_another(self, name: str) -> bool:
        """Whether a tensor says nothing that the model does not say already."""
        if is_recomputed(name):
            return True
        return (
            name == "lm_head.weight" and self.shape.tied_embeddings and self._equals(name, "model.embed_tokens.weight")
        )

    def _equals(self, name: str, other: str) -> bool:
        size = self.tensors[name][0]
        return self.tensors[name] == self.tensors[other] and same_bytes(
            self.read(name, 0, 0, size[0]), self.read(other, 0, 0, size[0])
        )


def open_source(folder: Path) -> HuggingFaceSource | MegatronReader:
    """A checkpoint folder, its format told by what is in it.

    Raises:
        SettingsError: it is neither, or damaged.
    """
    if (folder / MANIFEST_FILE).is_file():
        return MegatronReader(folder)
    if (folder / "config.json").is_file():
        return HuggingFaceSource(folder)
    problem = "has neither" if folder.is_dir() else "does not exist: needed is a folder with"
    raise SettingsError(f"{folder} {problem} config.json (Hugging Face) or {MANIFEST_FILE} (Megatron, of xrl convert)")


def total_bytes(source: Source) -> int:
    """Bytes of all tensors."""
    return sum(_num_bytes(size, dtype) for size, dtype in source.tensors.values())


def megatron_bytes(planned: Plan, source: Source) -> int:
    """Bytes of the parameters in all ranks' files, copies included.

    Raises:
        SettingsError: tensors of one parameter differ in number format.
    """
    dtypes = {name: dtype for name, (_, dtype) in source.tensors.items()}
    return sum(
        _num_bytes(parameter.shape, parameter_dtype(parameter, dtypes))
        for place in file_places(planned.layout)
        for parameter in planned.parameters(place)
    )


def to_megatron(source: Source, target: Path, planned: Plan, progress: Progress) -> None:
    """Write the files of every rank; the folder appears whole or not at all.

    Raises:
        SettingsError: `target` exists, or tensors of one parameter differ in number format: before a file is touched.
    """
    _check_new(target)
    megatron_bytes(planned, source)
    dtypes = {name: dtype for name, (_, dtype) in source.tensors.items()}
    with atomic_folder(target) as partial:
        for place in file_places(planned.layout):
            writer = RankFileWriter(partial / rank_file(planned.layout, place), planned, place, dtypes)
            for parameter in planned.parameters(place):
                tensor = torch.empty(parameter.shape, dtype=parameter_dtype(parameter, dtypes))
                fill(parameter, tensor, source.read)
                writer.put(parameter, tensor)
                progress(_exported_bytes(parameter, tensor.itemsize))
            writer.close()
        (partial / HUGGINGFACE_FOLDER).mkdir()
        copy_other_files(source.other_files, partial / HUGGINGFACE_FOLDER)
        write_manifest(partial, planned)


def to_huggingface(source: Source, target: Path, progress: Progress, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write a folder that `from_pretrained` loads; it appears whole or not at all.

    Raises:
        SettingsError: `target` exists.
    """

    _check_new(target)

    def read(name: str) -> Tensor:
        size, dtype = source.tensors[name]
        tensor = source.read(name, 0, 0, size[0])
        progress(_num_bytes(size, dtype))
        return tensor

    with atomic_folder(target) as partial:
        write_safetensors(partial, source.tensors, read, max_shard_bytes=max_shard_bytes)
        copy_other_files(source.other_files, partial)


def round_trip(source: Source, planned: Plan, progress: Progress) -> Iterator[str]:
    """Take every tensor through the parameters of all ranks and back, and name those that come back different."""
    for part in planned.parts:
        found = {name: _unwritten(size, source.tensors[name][1]) for name, size in planned.tensors(part).items()}
        for place in planned.holders(part):
            for parameter in planned.part_parameters(part, place):
                if not parameter.is_exported:
                    continue
                tensor = _unwritten(parameter.shape, source.tensors[parameter.tensors[0]][1])
                fill(parameter, tensor, source.read)
                for piece in parameter.slices:
                    in_tensor(piece, found[piece.tensor]).copy_(in_parameter(piece, tensor))
        for name, tensor in found.items():
            if not same_bytes(tensor, source.read(name, 0, 0, tensor.shape[0])):
                yield name
            progress(tensor.nbytes)


def differences(left: Source, right: Source, progress: Progress) -> Iterator[str]:
    """Compare two checkpoints tensor by tensor, bit by bit; yields what differs."""
    for name, (size, dtype) in left.tensors.items():
        if name not in right.tensors:
            yield f"{name} is missing in {right.folder}"
        elif right.tensors[name] != (size, dtype):
            other_size, other_dtype = right.tensors[name]
            yield f"{name} is {_described(size, dtype)} in one and {_described(other_size, other_dtype)} in the other"
        else:
            a, b = (source.read(name, 0, 0, size[0]) for source in (left, right))
            if not same_bytes(a, b):
                count = int((a.view(torch.uint8) != b.view(torch.uint8)).view(a.numel(), -1).any(dim=1).sum())
                yield f"{name} differs in {count:,} of {a.numel():,} numbers"
        progress(_num_bytes(size, dtype))
    for name in right.tensors:
        if name not in left.tensors:
            yield f"{name} is missing in {left.folder}"


def _check_new(target: Path) -> None:
    if target.exists():
        raise SettingsError(f"{target} exists already: nothing is replaced, give a folder that does not exist")


def _unwritten(size: TensorShape, dtype: torch.dtype) -> Tensor:
    """NaN in every place, so that what is left out shows."""
    return torch.full(size, torch.nan, dtype=dtype)


def _exported_bytes(parameter: ParameterPlan, itemsize: int) -> int:
    """Bytes of the tensors that this parameter alone holds."""
    slices = parameter.slices if parameter.is_exported else ()
    numbers = torch.Size(parameter.shape).numel()
    return sum(numbers // parameter.shape[piece.dim] * piece.block * piece.count * itemsize for piece in slices)


def _num_bytes(size: TensorShape, dtype: torch.dtype) -> int:
    return torch.Size(size).numel() * dtype.itemsize


def _described(size: TensorShape, dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(size)}"
