"""How one Megatron parameter is made of Hugging Face tensors, in both directions.

Each rule knows which slices of which Hugging Face tensors a tensor-parallel rank needs (loading reads
nothing else), and how the shards of all ranks turn back into whole Hugging Face tensors (export).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Reads rows [start, stop) along a dimension of a Hugging Face tensor: (name, dim, start, stop) -> tensor.
ReadSlice = Callable[[str, int, int, int], Tensor]


@dataclass(frozen=True)
class Rank:
    """A place in the tensor-parallel group."""

    index: int
    size: int

    def share(self, length: int) -> tuple[int, int]:
        """The rank's part [start, stop) of `length` equal rows."""
        part = length // self.size
        return self.index * part, (self.index + 1) * part


class Mapping(Protocol):
    """A rule between one Megatron parameter and the Hugging Face tensors it holds."""

    @property
    def names(self) -> tuple[str, ...]:
        """The Hugging Face tensors involved."""

    @property
    def is_sharded(self) -> bool:
        """Whether tensor-parallel ranks hold different parts."""

    def load(self, read: ReadSlice, rank: Rank) -> Tensor:
        """This rank's Megatron parameter."""

    def export(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        """Whole Hugging Face tensors from every rank's shard (one shard where not sharded)."""


@dataclass(frozen=True)
class Replicated:
    """The same vector on every rank: norms."""

    name: str
    length: int
    is_sharded = False

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def load(self, read: ReadSlice, rank: Rank) -> Tensor:
        return read(self.name, 0, 0, self.length)

    def export(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        return {self.name: shards[0]}


@dataclass(frozen=True)
class RowParallel:
    """A matrix cut along its inputs (dimension 1): attention and MLP output projections."""

    name: str
    num_inputs: int
    is_sharded = True

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def load(self, read: ReadSlice, rank: Rank) -> Tensor:
        return read(self.name, 1, *rank.share(self.num_inputs))

    def export(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        return {self.name: torch.cat(list(shards), dim=1)}


@dataclass(frozen=True)
class Vocabulary:
    """A matrix cut along the vocabulary (dimension 0), padded with zero rows until it divides evenly."""

    name: str
    num_rows: int
    is_sharded = True

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def load(self, read: ReadSlice, rank: Rank) -> Tensor:
        per_rank = -(-self.num_rows // rank.size)
        start = min(rank.index * per_rank, self.num_rows)
        stop = min(start + per_rank, self.num_rows)
        rows = read(self.name, 0, start, stop)
        missing = per_rank - (stop - start)
        return torch.cat([rows, rows.new_zeros(missing, rows.shape[1])]) if missing else rows

    def export(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        return {self.name: torch.cat(list(shards))[: self.num_rows]}


@dataclass(frozen=True)
class QueryKeyValue:
    """Megatron's joint projection: for each key/value head its query heads, its key head, its value head.

    Serves weights [(heads + 2 kv_heads) * head_dim, hidden] and biases [(heads + 2 kv_heads) * head_dim].
    """

    query: str
    key: str
    value: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    is_sharded = True

    @property
    def names(self) -> tuple[str, ...]:
        return (self.query, self.key, self.value)

    def load(self, read: ReadSlice, rank: Rank) -> Tensor:
        first, last = rank.share(self.num_kv_heads)
        query_rows = self.num_heads // self.num_kv_heads * self.head_dim
        parts = []
        for name, rows in ((self.query, query_rows), (self.key, self.head_dim), (self.value, self.head_dim)):
            part = read(name, 0, first * rows, last * rows)
            parts.append(part.view(last - first, rows, *part.shape[1:]))
        return torch.cat(parts, dim=1).flatten(0, 1)

    def export(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        whole = torch.cat(list(shards))
        query_rows = self.num_heads // self.num_kv_heads * self.head_dim
        by_head = whole.view(self.num_kv_heads, query_rows + 2 * self.head_dim, *whole.shape[1:])
        parts = by_head.split([query_rows, self.head_dim, self.head_dim], dim=1)
        return {name: part.flatten(0, 1) for name, part in zip(self.names, parts, strict=True)}


@dataclass(frozen=True)
class GateUp:
    """The two inputs of SwiGLU, each cut along its outputs, gate first on every rank."""

    gate: str
    up: str
    num_outputs: int
    is_sharded = True

    @property
    def names(self) -> tuple[str, ...]:
        return (self.gate, self.up)

    def load(self, read: ReadSlice, rank: Rank) -> Tensor:
        share = rank.share(self.num_outputs)
        return torch.cat([read(self.gate, 0, *share), read(self.up, 0, *share)])

    def export(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return {self.gate: torch.cat(gates), self.up: torch.cat(ups)}
