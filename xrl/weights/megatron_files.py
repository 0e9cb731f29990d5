"""Megatron checkpoint folders: weights alone, in Megatron-LM's `torch` format, beside a manifest of the layout.

    xrl_manifest.json                        the layout, so that the way back needs no flags; written last
    latest_checkpointed_iteration.txt        "release": Megatron's word for weights that no training step made
    release/mp_rank_00_001/model_optim_rng.pt    one file a (tensor, pipeline, expert) rank, as torch.save writes it
    huggingface/                             config.json, tokenizer and whatever else stood beside the weights

A file is {"model": {name: tensor}, "args": ..., "checkpoint_version": 3.0}; with a virtual pipeline "model0", "model1",
... in place of "model". It is first written with room for the tensors, which are then filled in one by one, and read
through a memory map: neither direction ever holds more than a parameter.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import pickle  # for the name of its error alone: torch.load raises it
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from xrl.config import SettingsError
from xrl.config.json_file import read_json_object
from xrl.config.printable import shown
from xrl.parallel.layout import Layout, Place
from xrl.weights.hf_files import raw_bytes, read_checked_shape
from xrl.weights.plan import ParameterPlan, Plan, plan
from xrl.weights.reshard import rows_of
from xrl.weights.slices import in_parameter

MANIFEST_FILE = "xrl_manifest.json"
HUGGINGFACE_FOLDER = "huggingface"
_FORMAT = 1
# Ranks of a layout: each has a file, so there are never many.
_LARGEST_SIZE = 100_000
_WEIGHTS_FILE = "model_optim_rng.pt"


def rank_file(layout: Layout, place: Place) -> Path:
    """Where Megatron-LM looks for a rank's weights, below the checkpoint folder."""
    name = f"mp_rank_{place.tensor:02d}"
    if layout.pipeline_size > 1:
        name += f"_{place.pipeline:03d}"
    if layout.expert_size > 1:
        name += f"_{place.expert:03d}"
    return Path("release") / name / _WEIGHTS_FILE


def file_places(layout: Layout) -> Iterator[Place]:
    """A place for each file: all ranks but replicas."""
    for pipeline, expert, tensor in product(
        range(layout.pipeline_size), range(layout.expert_size), range(layout.tensor_size)
    ):
        data, context = divmod(expert, layout.context_size)
        yield Place(tensor=tensor, pipeline=pipeline, expert=expert, data=data, context=context)


def write_manifest(folder: Path, planned: Plan) -> None:
    """Say how the weights are laid out, and let Megatron-LM find them."""
    manifest = {
        "format": _FORMAT,
        "architecture": planned.shape.architecture,
        "transformer_engine": planned.transformer_engine,
        "layout": asdict(planned.layout),
    }
    (folder / "latest_checkpointed_iteration.txt").write_text("release")
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")


def read_plan(folder: Path) -> Plan:
    """The plan of the weights in a Megatron checkpoint folder.

    Raises:
        SettingsError: the manifest is damaged, or of another version.
    """
    file = folder / MANIFEST_FILE
    manifest = read_json_object(file)
    if manifest.get("format") != _FORMAT:
        raise SettingsError(f"{file} has format {shown(manifest.get('format'))}, this version reads format {_FORMAT}")
    try:
        layout = Layout(**_sizes(manifest["layout"]))
        engine = bool(manifest["transformer_engine"])
        architecture = manifest["architecture"]
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"{file} does not describe a checkpoint: {error}") from error
    shape = read_checked_shape(folder / HUGGINGFACE_FOLDER)
    if shape.architecture != architecture:
        raise SettingsError(
            f"{file} is of a {architecture}, the config.json in {HUGGINGFACE_FOLDER} of a {shape.architecture}"
        )
    return plan(shape, layout, transformer_engine=engine)


def _sizes(layout: object) -> dict[str, Any]:
    """The layout of a manifest, as far as its numbers are such."""
    if not isinstance(layout, dict):
        raise TypeError(f"layout {shown(layout)} is no object")
    for name, size in layout.items():
        if size is not None and (type(size) is not int or not 0 <= size <= _LARGEST_SIZE):
            raise ValueError(f"{name} {shown(size)} is no size of a layout")
    return layout


class RankFileWriter:
    """Writes one rank's file, a parameter at a time, in any order."""

    def __init__(self, file: Path, planned: Plan, place: Place, dtypes: Mapping[str, torch.dtype]) -> None:
        """Make the file, with room for every parameter.

        Args:
            dtypes: of Hugging Face tensors; a parameter has that of the tensors in it.
        """
        file.parent.mkdir(parents=True)
        with FakeTensorMode():
            stages: list[dict[str, Tensor]] = [{} for _ in range(planned.layout.virtual_pipeline_size)]
            for parameter in planned.parameters(place):
                stages[parameter.virtual_stage][self.name(parameter, planned)] = torch.empty(
                    parameter.shape, dtype=parameter_dtype(parameter, dtypes)
                )
        content = {
            **dict(zip(_model_keys(planned.layout), stages, strict=True)),
            "args": _megatron_arguments(planned),
            "checkpoint_version": 3.0,
            "iteration": 0,
        }
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(content, file)
        self._offsets = {
            (stage, name): offset
            for stage, names in enumerate(_stored_tensors(file, planned.layout))
            for name, (_, offset) in names.items()
        }
        self._planned = planned
        self._descriptor = os.open(file, os.O_WRONLY)

    @staticmethod
    def name(parameter: ParameterPlan, planned: Plan) -> str:
        """The parameter's name in the layers that the plan is for."""
        return parameter.names[-1 if planned.transformer_engine else 0]

    def put(self, parameter: ParameterPlan, tensor: Tensor) -> None:
        """Write one parameter."""
        offset = self._offsets[parameter.virtual_stage, self.name(parameter, self._planned)]
        content = raw_bytes(tensor)
        while content:
            written = os.pwrite(self._descriptor, content, offset)
            offset += written
            content = content[written:]

    def close(self) -> None:
        """Flush to disk."""
        os.fsync(self._descriptor)
        os.close(self._descriptor)


class MegatronReader:
    """Reads Hugging Face tensors by slices out of a Megatron checkpoint folder, without assembling more than that.

    Raises:
        SettingsError: a file is missing, truncated, or does not hold what the manifest says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.planned = read_plan(folder)
        self.shape = self.planned.shape
        self.other_files = folder / HUGGINGFACE_FOLDER
        self._files: dict[Path, list[dict[str, Tensor]]] = {}
        for place in file_places(self.planned.layout):
            self._check(place)
        self.tensors = {
            name: (size, self.parameter(*self.planned.sources(name)[0][:2]).dtype)
            for part in self.planned.parts
            for name, size in self.planned.tensors(part).items()
        }

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Rows [start, stop) along `dim` of a tensor."""
        size, dtype = self.tensors[name]
        pieces = self.planned.sources(name)
        if (cut := pieces[0][2].dim) != dim:
            return self.read(name, cut, 0, size[cut]).narrow(dim, start, stop - start)
        found = torch.empty([*size[:dim], stop - start, *size[dim + 1 :]], dtype=dtype)
        for place, parameter, piece in pieces:
            first, last = max(start, piece.source), min(stop, piece.source_stop)
            if first < last:
                held = rows_of(piece, first, last)
                rows = found.narrow(dim, first - start, last - first).unflatten(dim, (held.count, held.block))
                rows.copy_(in_parameter(held, self.parameter(place, parameter)))
        return found

    def parameter(self, place: Place, parameter: ParameterPlan) -> Tensor:
        """A rank's parameter, over the file's memory map."""
        return self._open(place)[parameter.virtual_stage][RankFileWriter.name(parameter, self.planned)]

    def differing_copies(self) -> Iterator[str]:
        """Parameters that should hold the same on several ranks, or zero (padding), but do not."""
        for place in file_places(self.planned.layout):
            for parameter in self.planned.parameters(place):
                tensor = self.parameter(place, parameter)
                expected = torch.zeros_like(tensor)
                for piece in parameter.slices:
                    rows = self.read(piece.tensor, piece.dim, piece.source, piece.source_stop)
                    in_parameter(piece, expected).copy_(rows.unflatten(piece.dim, (piece.count, piece.block)))
                if not same_bytes(tensor, expected):
                    yield f"{RankFileWriter.name(parameter, self.planned)} in {rank_file(self.planned.layout, place)}"

    def _check(self, place: Place) -> None:
        file = self.folder / rank_file(self.planned.layout, place)
        stages = self._open(place)
        for parameter in self.planned.parameters(place):
            name = RankFileWriter.name(parameter, self.planned)
            found = stages[parameter.virtual_stage].get(name)
            if found is None or tuple(found.shape) != parameter.shape:
                problem = "is missing" if found is None else f"has shape {list(found.shape)}"
                raise SettingsError(f"{file}: {name} {problem}, shape {list(parameter.shape)} is needed")

    def _open(self, place: Place) -> list[dict[str, Tensor]]:
        file = self.folder / rank_file(self.planned.layout, place)
        if file not in self._files:
            self._files[file] = _mapped_tensors(file, self.planned.layout)
        return self._files[file]


def parameter_dtype(parameter: ParameterPlan, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    """The number format of a parameter: that of all tensors in it.

    Raises:
        SettingsError: they have several.
    """
    (first, dtype), *others = ((name, dtypes[name]) for name in parameter.tensors)
    for name, other in others:
        if other != dtype:
            raise SettingsError(
                f"{first} is {str(dtype).removeprefix('torch.')} and {name} {str(other).removeprefix('torch.')}, "
                f"but they share the parameter {parameter.names[0]}: one number format is needed"
            )
    return dtype


def same_bytes(left: Tensor, right: Tensor) -> bool:
    """Bitwise equality: NaN equals itself, and zero does not equal minus zero."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
    return torch.equal(left.contiguous().view(bits), right.contiguous().view(bits))


def _model_keys(layout: Layout) -> list[str]:
    count = layout.virtual_pipeline_size
    return ["model"] if count == 1 else [f"model{stage}" for stage in range(count)]


def _stored_tensors(file: Path, layout: Layout) -> list[dict[str, tuple[Tensor, int]]]:
    """Every tensor in a rank's file, without its content, and the byte it starts at: a dictionary a virtual stage."""
    with FakeTensorMode(), torch.serialization.safe_globals([argparse.Namespace]):
        # Megatron's format is torch's, a pickle. `weights_only` runs nothing of it: it builds tensors, plain containers
        # and the one type allowed above, and refuses the rest.
        content = torch.load(file, weights_only=True)
    return [
        {name: (tensor, _offset(tensor)) for name, tensor in content[key].items() if isinstance(tensor, Tensor)}
        for key in _model_keys(layout)
    ]


def _offset(tensor: Tensor) -> int:
    start = tensor.untyped_storage()._checkpoint_offset
    if start is None:  # torch.load sets it for tensors without content
        raise ValueError("it is in torch.save's old format, which cannot be mapped")
    return start + int(tensor.storage_offset()) * tensor.element_size()


def _mapped_tensors(file: Path, layout: Layout) -> list[dict[str, Tensor]]:
    """Every tensor in a rank's file, read from disk where it is touched.

    Raises:
        SettingsError: the file cannot be read.
    """
    try:
        if not file.is_file():  # the library would wait for whoever writes to a pipe
            raise FileNotFoundError("there is no such file")
        stored = _stored_tensors(file, layout)
        with file.open("rb") as stream:
            memory = mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ)
    except (
        OSError,
        RuntimeError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        EOFError,
        ArithmeticError,
    ) as error:
        raise SettingsError(f"{file} is missing, truncated or corrupt: {error!r}") from error
    except pickle.UnpicklingError as error:
        raise SettingsError(f"{file} holds other things than tensors: {error}") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the memory is read-only, and we only read
        return [
            {
                name: torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(
                    tensor.shape
                )
                for name, (tensor, offset) in stage.items()
                if tensor.numel() and tensor.is_contiguous()
            }
            for stage in stored
        ]


def _megatron_arguments(planned: Plan) -> argparse.Namespace:
    """What Megatron-LM takes from a checkpoint with --use-checkpoint-args."""
    shape, layout = planned.shape, planned.layout
    virtual = layout.virtual_pipeline_size
    return argparse.Namespace(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_heads,
        group_query_attention=True,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        max_position_embeddings=shape.max_positions,
        position_embedding_type="rope",
        add_position_embedding=True,
        rotary_base=int(shape.rope_base),
        normalization="RMSNorm",
        norm_epsilon=shape.norm_eps,
        swiglu=True,
        add_bias_linear=shape.mlp_bias and shape.out_bias,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        untie_embeddings_and_output_weights=not shape.tied_embeddings,
        make_vocab_size_divisible_by=1,
        padded_vocab_size=layout.padded_vocab_size(shape.vocab_size),
        num_experts=shape.experts.num_experts if shape.experts else None,
        tensor_model_parallel_size=layout.tensor_size,
        pipeline_model_parallel_size=layout.pipeline_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        expert_model_parallel_size=layout.expert_size,
        decoder_first_pipeline_num_layers=layout.first_stage_layers,
        decoder_last_pipeline_num_layers=layout.last_stage_layers,
    )
