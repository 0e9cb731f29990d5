"""A vocabulary spread over ranks: where this rank's columns are, and what the shards' softmax statistics add up to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, distributed_c10d

from xrl.kernels.arguments import check_instance

# An id minus a higher one could come round to a column that there is.
_HIGHEST_START = 2**62

# Its name from torch 2.13 on, and before.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True, kw_only=True)
class VocabShard:
    """Which columns of the vocabulary this rank holds, as far as the caller knows. `VocabShard()`: all of them."""

    group: ProcessGroup | None = None  # ranks that hold the other columns; None: there are none
    # Id of the first column here. None: shards follow each other in the order of the ranks, and one more collective
    # finds out where this one begins.
    vocab_start: int | None = None
    num_columns: int | None = None  # columns that count, those behind are padding; None: all
    # Whether hidden states are this rank's slice of a sequence cut into equal parts along `group`. It matters to the
    # operations from hidden states: chunks are gathered, the sequence never is.
    sequence_parallel: bool = False


@dataclass(frozen=True, kw_only=True)
class ShardColumns:
    """This rank's columns of the logits as the primitives take them: nothing left out, and checked."""

    group: ProcessGroup | None  # ranks that hold the other columns; None: there are none
    vocab_start: int  # id of the first column
    num_columns: int  # columns that count; those behind are padding
    inverse_temperature: float  # 1 / temperature, by which logits are multiplied

    @property
    def group_name(self) -> str | None:
        """How an op of a compiled graph names the group; `named_group` finds it again."""
        return None if self.group is None else self.group.group_name


@dataclass(frozen=True, kw_only=True)
class Softmax:
    """Of each row over the whole vocabulary, all [R]; x = logit / temperature."""

    maximum: Tensor  # of the logits
    log_sum: Tensor  # log of the sum of exp((logit - maximum) / temperature)
    entropy: Tensor  # in nats

    def select(self, rows: Tensor) -> Softmax:
        """The softmax of some rows, [C]."""
        return Softmax(maximum=self.maximum[rows], log_sum=self.log_sum[rows], entropy=self.entropy[rows])


@dataclass(frozen=True, kw_only=True)
class TokenSoftmax(Softmax):
    """A softmax, and what it says of each row's chosen token, all [R]."""

    logprob: Tensor  # of the chosen token; NaN where no shard holds it
    found: Tensor  # bool: some shard holds the chosen token


def named_group(name: str | None) -> ProcessGroup | None:
    """Find the group of this name, by which ops of a compiled graph know it."""
    return None if name is None else distributed_c10d._resolve_process_group(name)  # type: ignore[attr-defined, arg-type, no-any-return, unused-ignore]


def check_shard(shard: VocabShard) -> VocabShard:
    """The shard; raises TypeError unless it and its fields are of their kind."""
    check_instance("shard", shard, VocabShard)
    if shard.group is not None and not torch.compiler.is_compiling() and not isinstance(shard.group, ProcessGroup):
        raise TypeError(f"group must be a process group, got {type(shard.group).__name__}")
    for name, value in (("num_columns", shard.num_columns), ("vocab_start", shard.vocab_start)):
        if value is not None and not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{name} must be a whole number, got {type(value).__name__}")
    return shard


def find_columns(shard: VocabShard | None, *, width: int, device: torch.device, temperature: float) -> ShardColumns:
    """Find out what a shard leaves out; None is one rank that holds all.

    Collective where the shard has a group and no `vocab_start`.

    Args:
        width: columns of this rank's logits, padding included.
        temperature: > 0, checked before.

    Raises:
        ValueError: out of range.
        TypeError: not of their kind.
    """
    shard = VocabShard() if shard is None else check_shard(shard)
    group, vocab_start = shard.group, shard.vocab_start
    columns = width if shard.num_columns is None else shard.num_columns
    if not 0 <= columns <= width:
        raise ValueError(f"num_columns must be in [0, {width}], as this rank holds {width} columns, got {columns}")
    if vocab_start is None:
        vocab_start = 0
        if group is not None:
            mine = torch.tensor([columns], device=device)
            everyone = torch.empty(dist.get_world_size(group), dtype=mine.dtype, device=device)
            _all_gather(everyone, mine, group=group)
            vocab_start = int(everyone[: dist.get_rank(group)].sum())
    if not 0 <= vocab_start <= _HIGHEST_START:
        raise ValueError(f"vocab_start must be >= 0 and at most 2^62, got {vocab_start}")
    return ShardColumns(
        group=group, vocab_start=vocab_start, num_columns=columns, inverse_temperature=1.0 / temperature
    )


def combine(statistics: Tensor, token_ids: Tensor, columns: ShardColumns) -> TokenSoftmax:
    """The softmax of the whole vocabulary from every shard's `Backend.statistics` [4, R]. One collective."""
    return start_combining(statistics, token_ids, columns)()


def start_combining(statistics: Tensor, token_ids: Tensor, columns: ShardColumns) -> Callable[[], TokenSoftmax]:
    """Begin what `combine` does. What is returned waits for the other shards: call it after what can run meanwhile."""
    group = columns.group
    local = token_ids.long() - columns.vocab_start
    owned = (local >= 0) & (local < columns.num_columns)
    if group is None:
        maximum, total, total_shifted, target = statistics.unbind()
        return lambda: _softmax(maximum, total, total_shifted, target, found=owned)
    # The chosen token's s is at most 0: infinity says that it is elsewhere.
    mine = torch.cat([statistics[:3], torch.where(owned, statistics[3], math.inf)[None]])
    num_shards = dist.get_world_size(group)
    shards = mine.new_empty(num_shards * len(mine), mine.shape[1])
    work = _all_gather(shards, mine, group=group, async_op=True)

    def finish(_sent: Tensor = mine) -> TokenSoftmax:  # which must live until it has been sent
        work.wait()  # Unbounded: the group has a time-out.
        return _merge(shards.unflatten(0, (num_shards, -1)), inverse_temperature=columns.inverse_temperature)

    return finish


def _merge(shards: Tensor, *, inverse_temperature: float) -> TokenSoftmax:
    """Of statistics [shards, 4, R], the chosen token's s infinite where a shard doesn't hold it."""
    maxima, sums, shifted, targets = shards.unbind(1)
    maximum = maxima.amax(0)
    # A shard without possible tokens has maximum -inf and sums 0: it must add 0, not 0 * -inf.
    below = torch.where(maxima == -math.inf, 0.0, maxima - maximum) * inverse_temperature
    scale = below.exp()
    # Where the scale is 0, so is the term, whatever it is multiplied by.
    total = (sums * scale).sum(0)
    total_shifted = torch.where(scale == 0, 0.0, (shifted + sums * below) * scale).sum(0)
    here = targets != math.inf
    target = torch.where(here, targets + below, 0.0).sum(0)
    return _softmax(maximum, total, total_shifted, target, found=here.any(0))


def _softmax(maximum: Tensor, total: Tensor, total_shifted: Tensor, target: Tensor, *, found: Tensor) -> TokenSoftmax:
    log_sum = total.log()
    return TokenSoftmax(
        maximum=maximum,
        log_sum=log_sum,
        entropy=log_sum - total_shifted / total,
        logprob=torch.where(found, target - log_sum, math.nan),
        found=found,
    )
