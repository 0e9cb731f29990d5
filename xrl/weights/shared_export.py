"""The model out of its ranks where all of them are on one host: each writes its share straight to where workers read.

Nothing is sent and nothing gathered: a layer's bytes are copied once, by the ranks at the same time, into memory that
rank 0 keeps (see xrl.weights.transport.shared_memory).

    rank 0    room for i | write | all have written | checksum a share | yield i, the consumer sends it | ...
    rank r                 write | all have written | checksum a share | wait for room for i + 1
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from xrl.models.shape import ModelShape
from xrl.parallel.groups import ParallelGroups
from xrl.types import WeightBucket
from xrl.weights.checksum import joined_checksum, partial_checksum
from xrl.weights.export import export_into
from xrl.weights.plan import Plan, plan
from xrl.weights.slices import Weights, has_engine_layers
from xrl.weights.transport import TensorEntry
from xrl.weights.transport.shared_memory import Receiver, Sender


@dataclass(frozen=True, kw_only=True)
class ProvenBucket(WeightBucket):
    """A bucket whose checksum is known."""

    checksum: str


class SharedExporter:
    """Exports weights as often as asked for. All ranks must be on one host, with weights on the CPU."""

    def __init__(self, shape: ModelShape, groups: ParallelGroups) -> None:
        self.shape = shape
        self.groups = groups
        self._place = groups.layout.place(groups.rank)
        self._receiver = Receiver()  # of the other ranks: rank 0's memory, mapped once
        self._plan: Plan | None = None

    @torch.no_grad()
    def stream(self, weights: Weights, sender: Sender | None, *, version: int) -> Iterator[ProvenBucket]:
        """Yield embeddings, then each decoder layer, then final norm and head: on rank 0 only.

        Collective: every rank must run the generator to its end.

        Args:
            weights: this rank's, by their names in the GPTModel, one mapping for each virtual pipeline stage.
            sender: with the memory; on rank 0, None on the others.
        """
        if self._plan is None:
            self._plan = plan(self.shape, self.groups.layout, transformer_engine=has_engine_layers(weights[0]))
        dtype = next(iter(weights[0].values())).dtype
        for part in self._plan.parts:
            entries = _entries(self._plan, part, dtype)
            tensors, where = sender.place(entries) if sender is not None else ({}, {})
            where = self._from_root(where, len(entries))
            if sender is None:
                tensors = self._receiver.views(entries, where)
            if self._place in self._plan.holders(part):
                export_into(weights, self._plan, self._place, part, tensors)
            dist.barrier(self.groups.control)
            checksum = self._checksum(tensors)
            if checksum is not None:
                yield ProvenBucket(version=version, layer=part, tensors=tensors, checksum=checksum)

    def _checksum(self, tensors: Mapping[str, Tensor]) -> str | None:
        """Of all of them, on rank 0; each rank reads its share."""
        rank, size = self.groups.rank, self.groups.layout.world_size
        mine = partial_checksum({name: tensors[name] for name in list(tensors)[rank::size]})
        everyone = [torch.zeros(1, dtype=torch.long) for _ in range(size)] if rank == 0 else None
        dist.gather(torch.tensor([mine]), everyone, group_dst=0, group=self.groups.control)
        return None if everyone is None else joined_checksum(int(share) for share in everyone)

    def _from_root(self, where: dict[str, object], num_tensors: int) -> dict[str, object]:
        """What rank 0 holds, on every rank: four numbers and an offset for each tensor."""
        numbers = torch.zeros(3 + num_tensors, dtype=torch.long)
        if where:
            numbers = torch.tensor([where["pid"], where["descriptor"], where["num_bytes"], *where["offsets"]])  # type: ignore[misc]
        dist.broadcast(numbers, group_src=0, group=self.groups.control)
        pid, descriptor, num_bytes, *offsets = numbers.tolist()
        return {"pid": pid, "descriptor": descriptor, "num_bytes": num_bytes, "offsets": offsets}


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
