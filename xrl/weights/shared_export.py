"""The model out of its ranks where all of them are on one host: each writes its share straight to where workers read.

Nothing is sent and nothing gathered: a layer's bytes are copied once, by the ranks at the same time, into memory that
rank 0 keeps (see xrl.weights.transport.shared_memory).

    rank 0    room for i | write | all have written | checksum a share | yield i, the consumer sends it | ...
    rank r                 write | all have written | checksum a share | wait for room for i + 1
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from xrl.models.shape import ModelShape
from xrl.parallel.groups import ParallelGroups
from xrl.types import WeightBucket
from xrl.weights.checksum import can_sum, checksum_from_sums, joined_checksum, num_sums, partial_checksum
from xrl.weights.export import export_into
from xrl.weights.plan import Plan, plan
from xrl.weights.slices import Weights, has_engine_layers
from xrl.weights.transport import TensorEntry
from xrl.weights.transport.shared_memory import Receiver, Sender


@dataclass(frozen=True, kw_only=True)
class ProvenBucket(WeightBucket):
    """A bucket whose checksum is known."""

    checksum: str


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A part of the model as it lies in the memory, and where in each rank's sums its tensors' are."""

    name: str
    entries: Sequence[TensorEntry]
    sums: Mapping[str, slice]  # of those tensors whose sums are taken as they are copied
    num_sums: int
    holders: Sequence[int]  # ranks that write it

    def views(self, sums: Tensor) -> dict[str, Tensor]:
        """Each tensor's place in one rank's sums."""
        return {name: sums[place] for name, place in self.sums.items()}


class SharedExporter:
    """Exports weights as often as asked for. All ranks must be on one host, with weights on the CPU."""

    def __init__(self, shape: ModelShape, groups: ParallelGroups) -> None:
        self.shape = shape
        self.groups = groups
        self._place = groups.layout.place(groups.rank)
        self._receiver = Receiver()  # of the other ranks: rank 0's memory, mapped once
        self._plan: Plan | None = None
        self._parts: list[_Part] = []
        # Each rank adds up its share's sums in a row of its own: [world size, most sums of a part].
        self._sums_sender: Sender | None = None
        self._sums = torch.empty(0, 0, dtype=torch.long)

    @torch.no_grad()
    def stream(self, weights: Weights, sender: Sender | None, *, version: int) -> Iterator[ProvenBucket]:
        """Yield embeddings, then each decoder layer, then final norm and head: on rank 0 only.

        Collective: every rank must run the generator to its end.

        Args:
            weights: this rank's, by their names in the GPTModel, one mapping for each virtual pipeline stage.
            sender: with the memory; on rank 0, None on the others.
        """
        planned = self._prepare(weights)
        mine = self._sums[self.groups.rank]
        for part in self._parts:
            # What rank 0 sends says that the room is free, too.
            tensors = self._shared(sender, self._receiver, part.entries)
            if self.groups.rank in part.holders:
                mine[: part.num_sums].zero_()
                export_into(weights, planned, self._place, part.name, tensors, part.views(mine))
            dist.barrier(self.groups.control)
            if sender is not None:
                checksum = self._checksum(part, tensors)
                yield ProvenBucket(version=version, layer=part.name, tensors=tensors, checksum=checksum)

    def _prepare(self, weights: Weights) -> Plan:
        """Plan, and agree on the memory of the sums, with the first update."""
        if self._plan is None:
            self._plan = plan(self.shape, self.groups.layout, transformer_engine=has_engine_layers(weights[0]))
            dtype = next(iter(weights[0].values())).dtype
            self._parts = [_make_part(self._plan, name, dtype) for name in self._plan.parts]
            words = max(part.num_sums for part in self._parts)
            entry = TensorEntry(name="sums", dtype="int64", shape=(self.groups.layout.world_size, words))
            self._sums_sender = Sender() if self.groups.rank == 0 else None
            self._sums = self._shared(self._sums_sender, Receiver(), [entry])["sums"]
        return self._plan

    def _checksum(self, part: _Part, tensors: Mapping[str, Tensor]) -> str:
        everyone = self._sums[list(part.holders), : part.num_sums].numpy().view(np.uint64).sum(axis=0, dtype=np.uint64)
        shares = [checksum_from_sums(everyone[place], name, tensors[name]) for name, place in part.sums.items()]
        others = {name: tensor for name, tensor in tensors.items() if name not in part.sums}
        return joined_checksum([*shares, partial_checksum(others)])

    def _shared(
        self, sender: Sender | None, receiver: Receiver, entries: Sequence[TensorEntry]
    ) -> Mapping[str, Tensor]:
        """Room that rank 0 gives, on every rank. What is sent: four numbers and an offset for each tensor."""
        numbers = torch.zeros(3 + len(entries), dtype=torch.long)
        tensors: Mapping[str, Tensor] = {}
        if sender is not None:
            tensors, where = sender.place(entries)
            numbers = torch.tensor([where["pid"], where["descriptor"], where["num_bytes"], *where["offsets"]])
        dist.broadcast(numbers, group_src=0, group=self.groups.control)
        if sender is not None:
            return tensors
        pid, descriptor, num_bytes, *offsets = numbers.tolist()
        where = {"pid": pid, "descriptor": descriptor, "num_bytes": num_bytes, "offsets": offsets}
        return receiver.views(entries, where)


def _make_part(planned: Plan, name: str, dtype: torch.dtype) -> _Part:
    entries = _entries(planned, name, dtype)
    sums, end = {}, 0
    for entry in entries:
        if _can_sum(planned, entry):
            start, end = end, end + num_sums(entry.num_bytes)
            sums[entry.name] = slice(start, end)
    layout = planned.layout
    holders = set(planned.holders(name))
    ranks = [rank for rank in range(layout.world_size) if layout.place(rank) in holders]
    return _Part(name=name, entries=entries, sums=sums, num_sums=end, holders=ranks)


def _can_sum(planned: Plan, entry: TensorEntry) -> bool:
    """Whether the tensor's pieces begin and end with whole words, whichever rank holds them."""
    for _, _, piece in planned.sources(entry.name):
        row = math.prod(entry.shape[piece.dim + 1 :]) * entry.torch_dtype.itemsize
        if not can_sum(entry.shape[piece.dim] * row, piece.source * row, piece.block * row):
            return False
    return True


def _entries(planned: Plan, part: str, dtype: torch.dtype) -> list[TensorEntry]:
    """The part's tensors as they are to lie in the memory."""
    formats = dict.fromkeys(planned.tensors(part), dtype)
    for place in planned.holders(part):
        for parameter in planned.part_parameters(part, place):
            if parameter.keeps_dtype:
                formats |= {piece.tensor: torch.float32 for piece in parameter.slices}
    return [
        TensorEntry(name=name, dtype=str(formats[name]).removeprefix("torch."), shape=tuple(shape))
        for name, shape in planned.tensors(part).items()
    ]
