"""Reads a saved state's tensors by rows or by elements, whichever ranks wrote them: with the memory of the result."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from xrl.checkpoint.manifest import Manifest, Unusable, rank_file
from xrl.parallel.layout import Place
from xrl.weights.plan import ParameterPlan, Plan, Slice
from xrl.weights.reshard import intersect
from xrl.weights.slices import fill, in_parameter


class StateReader:
    """The tensors of one saved state, which has been checked (`check_files`, checksums)."""

    def __init__(self, folder: Path, manifest: Manifest, plan: Plan) -> None:
        """
        Args:
            plan: of the layout that saved.
        """
        self.folder, self.manifest, self.plan = folder, manifest, plan
        self._open: dict[str, Any] = {}
        self._pieces: dict[str, dict[str, list[tuple[int, int, str]]]] = {}

    def __enter__(self) -> StateReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.clear()

    def parameter(self, parameter: ParameterPlan, kind: str, target: Plan, place: Place) -> Tensor:
        """All elements [numel] of a parameter of the rank at `place` of a target layout, padding as zero."""
        if self._is_cut_alike(target):
            holder = self._holder(parameter, place)
            if holder is not None:
                return self._elements(holder, parameter, kind, 0, math.prod(parameter.shape))
        whole = torch.empty(parameter.shape, dtype=torch.float32)
        fill(parameter, whole, lambda *rows: self._rows(kind, *rows))
        return whole.view(-1)

    def share(
        self, parameter: ParameterPlan, kind: str, target: Plan, place: Place, *, start: int, stop: int
    ) -> Tensor:
        """Elements [start, stop) of it."""
        if self._is_cut_alike(target):
            holder = self._holder(parameter, place)
            if holder is not None:
                return self._elements(holder, parameter, kind, start, stop)
        return self.parameter(parameter, kind, target, place)[start:stop]

    def _is_cut_alike(self, target: Plan) -> bool:
        """Whether a rank of the target holds the same of the model as the one at its place did."""
        return _cut(self.plan) == _cut(target)

    def _holder(self, parameter: ParameterPlan, place: Place) -> Place | None:
        """Where the same parameter was held by the one who wrote it; None for a copy of another parameter."""
        candidate = place if parameter.is_expert else replace(place, expert=0)
        for tensor in (place.tensor, 0):
            at = replace(candidate, tensor=tensor)
            for other in self.plan.part_parameters(parameter.part, at):
                if other.names == parameter.names and other.is_exported and other.slices == parameter.slices:
                    return at
        return None

    def _rows(self, kind: str, name: str, dim: int, start: int, stop: int) -> Tensor:
        """Rows [start, stop) along `dim` of a Hugging Face tensor."""
        shape = list(self.plan.tensors(self.plan.part_of(name))[name])
        shape[dim] = stop - start
        rows = torch.empty(shape, dtype=torch.float32)
        wanted = Slice(tensor=name, dim=dim, source=start, target=0, block=stop - start)
        num_found = 0
        for holder, parameter, piece in self.plan.sources(name):
            overlap = intersect(piece, wanted)
            if overlap is None:
                continue
            held, mine = overlap
            part, held = self._part_with(holder, parameter, kind, held)
            in_parameter(mine, rows).copy_(in_parameter(held, part).flatten(dim, dim + 1).unflatten(dim, (1, -1)))
            num_found += mine.block * mine.count
        if num_found != stop - start:
            raise Unusable(f"{self.folder} has {num_found} of rows {start} to {stop} of {name}")
        return rows

    def _part_with(self, holder: Place, parameter: ParameterPlan, kind: str, piece: Slice) -> tuple[Tensor, Slice]:
        """The least run of a parameter's elements that has the piece's rows, as a tensor, and the piece in it."""
        if piece.dim != 0:
            whole = self._elements(holder, parameter, kind, 0, math.prod(parameter.shape))
            return whole.view(parameter.shape), piece
        stride = piece.stride if piece.count > 1 else piece.block
        first = piece.target // stride * stride if piece.count > 1 else piece.target
        stop = first + piece.count * stride
        width = math.prod(parameter.shape[1:])
        run = self._elements(holder, parameter, kind, first * width, stop * width)
        return run.view(stop - first, *parameter.shape[1:]), replace(piece, target=piece.target - first)

    def _elements(self, holder: Place, parameter: ParameterPlan, kind: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a parameter, from the files of all who may have written some of it."""
        found = torch.empty(stop - start, dtype=torch.float32)
        num_found = 0
        for file in self._files_of(holder, parameter):
            for name in parameter.names:
                for piece_start, piece_stop, at in self._index(file).get(f"{name}/{kind}", ()):
                    low, high = max(start, piece_start), min(stop, piece_stop)
                    if low >= high:
                        continue
                    rows = self._read(file, at, low - piece_start, high - piece_start)
                    found[low - start : high - start] = rows
                    num_found += high - low
        if num_found != stop - start:
            raise Unusable(
                f"{self.folder} has {num_found:,} of the {stop - start:,} numbers that are needed of {kind} of "
                f"{parameter.names[0]}"
            )
        return found

    def _files_of(self, holder: Place, parameter: ParameterPlan) -> list[str]:
        layout = self.plan.layout
        places = (
            layout.place(layout.rank(tensor=holder.tensor, pipeline=holder.pipeline, data=data, context=context))
            for data in range(layout.data_size)
            for context in range(layout.context_size)
        )
        names = [rank_file(place) for place in places if not parameter.is_expert or place.expert == holder.expert]
        return [name for name in names if name in self.manifest.files]

    def _index(self, file: str) -> dict[str, list[tuple[int, int, str]]]:
        """`parameter/kind` -> [start, stop) and name of each piece in a file."""
        if file not in self._pieces:
            index: dict[str, list[tuple[int, int, str]]] = {}
            handle = self._handle(file)
            for at in handle.keys():  # noqa: SIM118 (a safetensors handle is no dict)
                of, _, start = at.rpartition("/")
                length = handle.get_slice(at).get_shape()[0]
                index.setdefault(of, []).append((int(start), int(start) + length, at))
            self._pieces[file] = index
        return self._pieces[file]

    def _read(self, file: str, at: str, start: int, stop: int) -> Tensor:
        rows: Tensor = self._handle(file).get_slice(at)[start:stop]
        return rows

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(self.folder / file, framework="pt")
            except (OSError, SafetensorError) as error:
                rank = self.manifest.files[file].rank
                raise Unusable(f"{self.folder / file}, written by rank {rank}, is damaged: {error}") from error
        return self._open[file]


def _cut(plan: Plan) -> tuple[object, ...]:
    """What a rank's share of the model depends on, beside its place."""
    layout = plan.layout
    return (
        *(layout.tensor_size, layout.pipeline_size, layout.virtual_pipeline_size, layout.expert_size),
        *(layout.first_stage_layers, layout.last_stage_layers, plan.transformer_engine),
    )
