"""Exports the model where all ranks are on one host: each writes its share straight to where workers read.

Nothing is sent and nothing gathered: a part's bytes are copied once, by the ranks at the same time, into memory that
rank 0 keeps (see xrl.weights.transport.shared_memory), and the sums of its checksum are taken in the same pass. The
ranks tell each other how far they are by counters in memory:

    rank 0    free segment i | write | all have written | checksum | yield i, the consumer sends it | free i + 1 | ...
    rank r                     write | wait for segment i + 1 ..........................................| write | ...

A segment is where one part of the model lies in that memory.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from xrl.kernels.native import native_module
from xrl.models.shape import ModelShape
from xrl.parallel.groups import ParallelGroups
from xrl.types import WeightBucket
from xrl.weights.checksum import (
    SummedTensor,
    SummingCopy,
    can_sum,
    checksum_from_sums,
    joined_checksum,
    partial_checksum,
)
from xrl.weights.export import share_of
from xrl.weights.plan import Plan, Slice, plan
from xrl.weights.slices import Weights, has_te_layers, in_parameter, in_tensor
from xrl.weights.transport import TensorEntry
from xrl.weights.transport.shared_memory import Receiver, Sender

ALIVE_INTERVAL_S = 1.0
TIMEOUT_S = 1800.0
CACHE_LINE = 16  # 32-bit counters


@dataclass(frozen=True, kw_only=True)
class ProvenBucket(WeightBucket):
    """A bucket whose checksum is known."""

    checksum: str


@dataclass(frozen=True, kw_only=True)
class _Part:
    """A part of the model as it lies in the memory."""

    name: str
    entries: Sequence[TensorEntry]
    summed: Mapping[str, SummedTensor]  # those whose sums are taken as they are copied
    num_sums: int
    holders: Sequence[int]  # ranks that write it


class SharedExporter:
    """Exports weights as often as asked for.

    All ranks must be on one host, with weights on the CPU and the compiled module.

    Args:
        timeout_s: longest wait of rank 0 for another rank's share. The others wait for rank 0 as long as it lives: it
            waits for workers, with time-outs of its own, and xrl.launch.watch misses one that hangs.
    """

    def __init__(self, shape: ModelShape, groups: ParallelGroups, *, timeout_s: float = TIMEOUT_S) -> None:
        self.timeout_s = timeout_s
        self.shape = shape
        self.groups = groups
        self._place = groups.layout.place(groups.rank)
        self._plan: Plan | None = None
        self._parts: list[_Part] = []
        self._receiver = Receiver()  # of the other ranks: rank 0's memory, mapped once
        self._own_sender: Sender | None = None
        self._is_under_way = False
        self._steps: _Steps | None = None
        # Each rank adds up its share's sums in a row of its own: [world size, most sums of a part].
        self._sums = torch.empty(0, 0, dtype=torch.long)
        # Part -> addresses of all tensors, and the copies between them: most updates find them where they were.
        self._copies: dict[str, tuple[tuple[int, ...], list[Callable[[], object]]]] = {}

    @torch.no_grad()
    def stream(self, weights: Weights, sender: Sender | None, *, version: int) -> Iterator[ProvenBucket]:
        """Yield embeddings, then each decoder layer, then final norm and head: on rank 0 only.

        Collective: every rank must run the generator to its end.

        Args:
            weights: this rank's, by their names in the GPTModel, one mapping for each virtual pipeline stage;
                contiguous, and always in the number format of the first update.
            sender: with the memory; on rank 0, None on the others.

        Raises:
            RuntimeError: another rank has ended, or does not come; or the last update was not run to its end.
        """
        if native_module() is None:
            raise RuntimeError("weights cannot be exported through shared memory without xrl's compiled module")
        if self._is_under_way:
            raise RuntimeError(
                "the last update of the weights was not run to its end: ranks no longer agree on the next"
            )
        self._is_under_way = True
        planned = self._prepare(weights)
        assert self._steps is not None
        rank, mine = self.groups.rank, self._sums[self.groups.rank]
        segments = self._segments(sender, self._receiver, [part.entries for part in self._parts])
        for part, tensors in zip(self._parts, segments, strict=True):
            if rank == 0:
                self._steps.free_segment()
            if rank in part.holders:
                self._steps.wait_for_segment()
                mine[: part.num_sums].zero_()
                self._write(planned, weights, part, tensors)
            self._steps.finish()
            if rank == 0:
                self._steps.wait_for_ranks(part.holders)
                checksum = self._checksum(part, tensors)
                yield ProvenBucket(version=version, part=part.name, tensors=tensors, checksum=checksum)
        self._is_under_way = False

    def _write(self, planned: Plan, weights: Weights, part: _Part, tensors: Mapping[str, Tensor]) -> None:
        """This rank's share of a part, with its sums."""
        share = list(share_of(weights, planned, self._place, part.name))
        where = tuple(tensor.data_ptr() for tensor in (*tensors.values(), *(source for _, source in share)))
        if self._copies.get(part.name, ((), []))[0] != where:
            self._copies[part.name] = where, [self._copy(part, piece, source, tensors) for piece, source in share]
        for copy in self._copies[part.name][1]:
            copy()

    def _copy(self, part: _Part, piece: Slice, source: Tensor, tensors: Mapping[str, Tensor]) -> Callable[[], object]:
        whole = tensors[piece.tensor]
        target, source = in_tensor(piece, whole), in_parameter(piece, source)
        if piece.tensor not in part.summed:
            return partial(target.copy_, source)
        sums = part.summed[piece.tensor].in_share(self._sums[self.groups.rank])
        return SummingCopy(source, target, whole, sums).run

    def _prepare(self, weights: Weights) -> Plan:
        """Plan, and agree on the memory for sums and counters, with the first update."""
        if self._plan is None:
            self._plan = plan(self.shape, self.groups.layout, transformer_engine=has_te_layers(weights[0]))
            dtype = next(iter(weights[0].values())).dtype
            self._parts = [_make_part(self._plan, name, dtype) for name in self._plan.parts]
            size = self.groups.layout.world_size
            sums = TensorEntry(name="sums", dtype="int64", shape=(size, max(part.num_sums for part in self._parts)))
            steps = TensorEntry(name="steps", dtype="int32", shape=(size + 1, CACHE_LINE))
            self._own_sender = Sender() if self.groups.rank == 0 else None
            (shared,) = self._segments(self._own_sender, Receiver(), [[sums, steps]])
            self._sums = shared["sums"]
            self._steps = _Steps(shared["steps"], self.groups, self.timeout_s)
        return self._plan

    def _checksum(self, part: _Part, tensors: Mapping[str, Tensor]) -> str:
        summed = checksum_from_sums([self._sums[rank] for rank in part.holders], part.summed.values())
        others = {name: tensor for name, tensor in tensors.items() if name not in part.summed}
        return joined_checksum([summed, partial_checksum(others)])

    def _segments(
        self, sender: Sender | None, receiver: Receiver, buckets: Sequence[Sequence[TensorEntry]]
    ) -> list[Mapping[str, Tensor]]:
        """Segments that rank 0 reserves, on every rank. What is sent: four numbers and an offset for each tensor."""
        numbers = torch.zeros(4 + sum(map(len, buckets)), dtype=torch.long)
        segments: list[Mapping[str, Tensor]] = []
        if sender is not None:
            sender.restart()
            reserved = [sender.reserve(entries) for entries in buckets]
            segments = [tensors for tensors, _ in reserved]
            last = reserved[-1][1]
            offsets = [offset for _, where in reserved for offset in where["offsets"]]
            numbers = torch.tensor([last["pid"], last["descriptor"], last["inode"], sender.num_bytes, *offsets])
        dist.broadcast(numbers, group_src=0, group=self.groups.control)
        if sender is None:
            pid, descriptor, inode, num_bytes, *offsets = numbers.tolist()
            memory = {"pid": pid, "descriptor": descriptor, "inode": inode, "num_bytes": num_bytes}
            for entries in buckets:
                segments.append(receiver.views(entries, {**memory, "offsets": offsets[: len(entries)]}))
                del offsets[: len(entries)]
        return segments


class _Steps:
    """How far each rank is, in memory that all of them see. A step is a part of the model, over all updates.

    Args:
        counters: [world size + 1, CACHE_LINE] int32. Of each rank the parts it has written, and its process; in the
            last row the parts whose segments were free.
    """

    def __init__(self, counters: Tensor, groups: ParallelGroups, timeout_s: float) -> None:
        self._counters, self._timeout_s = counters, timeout_s
        self._native = native_module()
        self._step, self._rank = 0, groups.rank
        counters[groups.rank, 1] = os.getpid()
        dist.barrier(groups.control)

    def free_segment(self) -> None:
        """Say, on rank 0, that the next part may be written."""
        self._set(-1, self._step + 1)

    def wait_for_segment(self) -> None:
        """Wait until the next part may be written."""
        self._wait(-1, self._step + 1, process=0, timeout_s=math.inf)

    def finish(self) -> None:
        """Say that this rank has written its share of the part, if it has one."""
        self._step += 1
        self._set(self._rank, self._step)

    def wait_for_ranks(self, ranks: Sequence[int]) -> None:
        """Wait until these have written the part, too."""
        for rank in ranks:
            self._wait(rank, self._step, process=rank, timeout_s=self._timeout_s)

    def _set(self, row: int, step: int) -> None:
        assert self._native is not None  # see `stream`
        self._native.set_step(self._counters[row].data_ptr(), step)

    def _wait(self, row: int, step: int, *, process: int, timeout_s: float) -> None:
        assert self._native is not None  # see `stream`
        deadline = time.monotonic() + timeout_s
        while not self._native.wait_for_step(self._counters[row].data_ptr(), step, ALIVE_INTERVAL_S):
            pid = int(self._counters[process, 1])
            if not _is_alive(pid):
                raise RuntimeError(f"weight update: rank {process} has ended (process {pid})")
            if time.monotonic() > deadline:
                raise RuntimeError(f"weight update: rank {process} (process {pid}) did not come within {timeout_s:g} s")


def _is_alive(pid: int) -> bool:
    """One that has ended, and that nobody has asked for its status, is not."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def _make_part(planned: Plan, name: str, dtype: torch.dtype) -> _Part:
    entries = _entries(planned, name, dtype)
    summed, end = {}, 0
    for entry in entries:
        if _can_sum(planned, entry):
            summed[entry.name] = SummedTensor.of(entry.name, entry.torch_dtype, entry.shape, start=end)
            end += summed[entry.name].num_sums
    layout = planned.layout
    holders = set(planned.holders(name))
    ranks = [rank for rank in range(layout.world_size) if layout.place(rank) in holders]
    return _Part(name=name, entries=entries, summed=summed, num_sums=end, holders=ranks)


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
