"""Streams the whole model out of its ranks, one part at a time, as Hugging Face tensors on rank 0.

Every rank that holds a share of a layer sends it to rank 0 in one message, and rank 0 lays the slices into whole
tensors. While the consumer works on one layer, the next one arrives in a second buffer:

    rank 0      wait for i | lay i out | ask for i+1 | consumer works on i and i-1 | wait for i+1 | ...
    rank r      pack i+1 | send | pack i+2 into the other buffer | wait until i+1 is taken | send | ...
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from xrl.models.shape import ModelShape
from xrl.parallel.groups import ParallelGroups
from xrl.parallel.layout import Place
from xrl.types import WeightBucket
from xrl.weights.plan import ParameterPlan, Plan, Slice, plan
from xrl.weights.slices import Weights, find_weight, has_te_layers, in_parameter, in_tensor

# Pieces start on borders of a cache line.
ALIGNMENT = 64


def export_weights(
    parameters: Mapping[str, Tensor] | Weights,
    shape: ModelShape,
    groups: ParallelGroups,
    *,
    version: int,
    dtype: torch.dtype | None = None,
) -> Iterator[WeightBucket]:
    """`WeightExporter.stream`, once: the buffers are given up afterwards."""
    return WeightExporter(shape, groups, dtype=dtype).stream(parameters, version=version)


def share_of(
    parameters: Mapping[str, Tensor] | Weights, planned: Plan, place: Place, part: str
) -> Iterator[tuple[Slice, Tensor]]:
    """What this rank writes into whole tensors of a part, where several ranks write into the same memory.

    Different ranks write different rows; a rank that holds nothing of the part that others do not write has no share.

    Args:
        parameters: this rank's weights by their names in the GPTModel (one mapping for each virtual stage).
        planned: `plan(shape, groups.layout)`.
        place: `groups.layout.place(groups.rank)`.
        part: one of `planned.parts`.

    Returns:
        Slices, each with the parameter that holds it.
    """
    weights = _per_stage(parameters)
    for parameter in planned.part_parameters(part, place):
        if parameter.is_exported:
            source = find_weight(parameter, weights)
            for piece in parameter.slices:
                yield piece, source


def _per_stage(parameters: Mapping[str, Tensor] | Weights) -> Weights:
    return [parameters] if isinstance(parameters, Mapping) else parameters


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """A slice on its way, and where it lies in its message."""

    parameter: ParameterPlan
    slice: Slice
    shape: tuple[int, ...]  # the cut dimension as (count, block)
    dtype: torch.dtype
    offset: int  # bytes

    def view(self, message: Tensor) -> Tensor:
        num_bytes = math.prod(self.shape) * self.dtype.itemsize
        return message[self.offset : self.offset + num_bytes].view(self.dtype).view(self.shape)


Message = list[_Piece]


@dataclass(frozen=True, kw_only=True)
class _Wave:
    """Messages under way to rank 0, at most one from each other rank, all of one part."""

    part: str
    messages: list[tuple[Message, Tensor, dist.Work]]

    def lay_out(self, tensors: Mapping[str, Tensor]) -> None:
        """Wait for the messages and copy them into whole tensors."""
        for message, buffer, work in self.messages:
            work.wait()  # Unbounded: the group has a time-out.
            for piece in message:
                in_tensor(piece.slice, tensors[piece.slice.tensor]).copy_(piece.view(buffer))


@dataclass(frozen=True, kw_only=True)
class _OwnShare:
    """What rank 0 gives to a part."""

    whole: dict[str, Tensor]  # tensors that its weights hold as they are
    copies: list[tuple[Slice, Tensor]]  # slices of the others, and the parameter they are in
    others: dict[str, tuple[int, tuple[int, ...], torch.dtype]]  # in the buffer: first byte, shape, number format
    num_bytes: int  # of those
    order: list[str]  # names of all


class WeightExporter:
    """Exports weights as often as asked for, always through the same buffers.

    Beside the model, rank 0 holds two neighbouring parts of it whole and what the other ranks have of one layer: two
    layers and the embeddings at most (or a third layer, where that is larger). Every other rank that sends holds its
    own share of two layers. Embeddings arrive in messages of a layer's size.

    Args:
        dtype: number format of the tensors; None: that of the weights. A router's bias stays in fp32.
    """

    def __init__(self, shape: ModelShape, groups: ParallelGroups, *, dtype: torch.dtype | None = None) -> None:
        self.shape = shape
        self.groups = groups
        self.dtype = dtype
        self._place = groups.layout.place(groups.rank)
        self._buffers: dict[str, Tensor] = {}
        self._plans: dict[bool, Plan] = {}
        self._messages: dict[tuple[str, Place, torch.dtype], list[Message]] = {}
        self._limits: dict[tuple[Place, torch.dtype], int] = {}

    @property
    def num_buffer_bytes(self) -> int:
        """Memory held beside the model, between updates too."""
        return sum(buffer.numel() for buffer in self._buffers.values())

    @torch.no_grad()
    def stream(self, parameters: Mapping[str, Tensor] | Weights, *, version: int) -> Iterator[WeightBucket]:
        """Yield embeddings, then each decoder layer, then final norm and head: on rank 0 only.

        A bucket's tensors are valid until the next but one is asked for: they are views of the weights themselves, or
        of buffers that are used again. Collective: every rank must run the generator to its end. Ranks that hold what
        others hold too, as the replicas of data parallelism do, return at once.

        Args:
            parameters: this rank's, by their names in the GPTModel: weights, or gradients, which have the same form.
                One mapping for each virtual pipeline stage, or the mapping itself where there is one.
        """
        weights = _per_stage(parameters)
        te = has_te_layers(weights[0])
        if te not in self._plans:
            self._plans[te] = plan(self.shape, self.groups.layout, transformer_engine=te)
        dtype = self.dtype or next(iter(weights[0].values())).dtype
        if self.groups.rank == 0:
            yield from self._receive(self._plans[te], weights, dtype, version)
        else:
            self._send(self._plans[te], weights, dtype)

    def _send(self, planned: Plan, weights: Weights, dtype: torch.dtype) -> None:
        sending: list[dist.Work | None] = [None, None]
        turn = 0
        for part in planned.parts:
            if self._place not in planned.holders(part):
                continue
            for message in self._messages_of(planned, part, self._place, dtype):
                if (work := sending[turn]) is not None:
                    work.wait()  # Unbounded: the group has a time-out.
                buffer = self._buffer(f"sent {turn}", self._limit(planned, self._place, dtype))
                for piece in message:
                    piece.view(buffer).copy_(in_parameter(piece.slice, find_weight(piece.parameter, weights)))
                sending[turn] = dist.isend(buffer[: _num_bytes(message)], dst=0)
                turn = 1 - turn
        for work in sending:
            if work is not None:
                work.wait()  # Unbounded: the group has a time-out.

    def _receive(self, planned: Plan, weights: Weights, dtype: torch.dtype, version: int) -> Iterator[WeightBucket]:
        shares = [self._own_share(planned, weights, part, dtype) for part in planned.parts]
        sizes = [share.num_bytes for share in shares]
        # Parts lie at the two ends of the memory in turn, so that each stays while the next one is put together.
        memory = self._buffer("whole", max(map(sum, zip(sizes, sizes[1:], strict=False))))
        waves = self._waves(planned, dtype)
        wave = next(waves, None)
        for number, (part, share) in enumerate(zip(planned.parts, shares, strict=True)):
            start = memory.numel() - share.num_bytes if number % 2 else 0
            tensors = self._whole_tensors(share, memory[start:])
            while wave is not None and wave.part == part:
                wave.lay_out(tensors)
                wave = next(waves, None)  # arrives while the consumer works on this part
            yield WeightBucket(version=version, part=part, tensors=tensors)

    def _waves(self, planned: Plan, dtype: torch.dtype) -> Iterator[_Wave]:
        """Ask the other ranks for their next messages, in the order they send them."""
        for part in planned.parts:
            holders = [place for place in planned.holders(part) if place != self._place]
            messages = {place: self._messages_of(planned, part, place, dtype) for place in holders}
            for number in range(max(map(len, messages.values()), default=0)):
                arriving = []
                for place in holders:
                    if number < len(messages[place]):
                        message, rank = messages[place][number], _rank(planned, place)
                        limit = self._limit(planned, place, dtype)
                        buffer = self._buffer(f"tensor {place.tensor}, expert {place.expert}", limit)
                        work = dist.irecv(buffer[: _num_bytes(message)], src=rank)
                        assert work is not None  # it would be None for a rank that is no member of the group
                        arriving.append((message, buffer, work))
                yield _Wave(part=part, messages=arriving)

    def _whole_tensors(self, share: _OwnShare, buffer: Tensor) -> dict[str, Tensor]:
        """The part's tensors with this rank's slices in them: where one is a whole tensor already, without a copy."""
        tensors = dict(share.whole)
        for name, (start, shape, dtype) in share.others.items():
            num_bytes = math.prod(shape) * dtype.itemsize
            tensors[name] = buffer[start : start + num_bytes].view(dtype).view(shape)
        for piece, source in share.copies:
            in_tensor(piece, tensors[piece.tensor]).copy_(in_parameter(piece, source))
        return {name: tensors[name] for name in share.order}

    def _own_share(self, planned: Plan, weights: Weights, part: str, dtype: torch.dtype) -> _OwnShare:
        """What of a part rank 0 has whole, and where the rest is to be put together."""
        shapes = planned.tensors(part)
        formats = dict.fromkeys(shapes, dtype) | dict.fromkeys(planned.keeping_dtype(part), torch.float32)
        whole: dict[str, Tensor] = {}
        copies = []
        for parameter in planned.part_parameters(part, self._place):
            source = find_weight(parameter, weights)
            for piece in parameter.slices if parameter.is_exported else ():
                is_whole = piece.count == 1 and piece.block == shapes[piece.tensor][piece.dim]
                if is_whole and source.dtype == formats[piece.tensor]:
                    whole[piece.tensor] = source.narrow(piece.dim, piece.target, piece.block)
                else:
                    copies.append((piece, source))
        others: dict[str, tuple[int, tuple[int, ...], torch.dtype]] = {}
        end = 0
        for name, shape in shapes.items():
            if name not in whole:
                others[name] = (end, shape, formats[name])
                end += _aligned(math.prod(shape) * formats[name].itemsize)
        return _OwnShare(whole=whole, copies=copies, others=others, num_bytes=end, order=list(shapes))

    def _messages_of(self, planned: Plan, part: str, place: Place, dtype: torch.dtype) -> list[Message]:
        """What a rank sends of a part: sender and receiver work it out alike."""
        key = part, place, dtype
        if key not in self._messages:
            self._messages[key] = _pack(planned, part, place, dtype, self._limit(planned, place, dtype))
        return self._messages[key]

    def _limit(self, planned: Plan, place: Place, dtype: torch.dtype) -> int:
        """The longest message of a rank, in bytes: its share of its largest layer."""
        key = place, dtype
        if key not in self._limits:
            layers = [part for part in planned.parts[1:-1] if planned.stage(part) == place.pipeline]
            packed = [_pack(planned, part, place, dtype, None) for part in layers]
            lengths = [_num_bytes(message) for messages in packed for message in messages]
            self._limits[key] = max(lengths, default=0)
        return self._limits[key]

    def _buffer(self, name: str, num_bytes: int) -> Tensor:
        """Memory that is used again; it grows to the largest use."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < num_bytes:
            self._buffers.pop(name, None)
            buffer = self._buffers[name] = torch.empty(num_bytes, dtype=torch.uint8, device=self.groups.device)
        return buffer


def _pack(planned: Plan, part: str, place: Place, dtype: torch.dtype, limit: int | None) -> list[Message]:
    """Lay a rank's share of a part into messages of at most `limit` bytes; None: into one."""
    messages: list[Message] = []
    end = 0
    for parameter in planned.part_parameters(part, place):
        format_ = torch.float32 if parameter.keeps_dtype else dtype
        for whole in parameter.slices if parameter.is_exported else ():
            for piece in _split(whole, parameter.shape, format_.itemsize, limit):
                shape = (*parameter.shape[: piece.dim], piece.count, piece.block, *parameter.shape[piece.dim + 1 :])
                num_bytes = _aligned(math.prod(shape) * format_.itemsize)
                if not messages or (limit is not None and end + num_bytes > limit):
                    messages.append([])
                    end = 0
                messages[-1].append(_Piece(parameter=parameter, slice=piece, shape=shape, dtype=format_, offset=end))
                end += num_bytes
    return messages


def _split(piece: Slice, shape: tuple[int, ...], itemsize: int, limit: int | None) -> Iterator[Slice]:
    """Cut a run of rows into runs of at most `limit` bytes."""
    row_bytes = math.prod(shape) // shape[piece.dim] * itemsize
    if limit is None or piece.count > 1 or _aligned(piece.block * row_bytes) <= limit:
        yield piece
        return
    step = max(1, (limit - ALIGNMENT) // row_bytes)
    for start in range(0, piece.block, step):
        yield replace(
            piece,
            source=piece.source + start,
            target=piece.target + start,
            block=min(step, piece.block - start),
        )


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _num_bytes(message: Message) -> int:
    last = message[-1]
    return last.offset + _aligned(math.prod(last.shape) * last.dtype.itemsize)


def _rank(planned: Plan, place: Place) -> int:
    return planned.layout.rank(tensor=place.tensor, pipeline=place.pipeline, data=place.data, context=place.context)
