"""An output head taken a chunk of rows at a time: logits are made, used and dropped, and never held whole.

Shapes: T rows of hidden states on this rank, H hidden, V columns of this rank's shard of the vocabulary, R chosen rows,
C of them in a chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from xrl.kernels.arguments import check_count, check_instance
from xrl.kernels.matmul import has_matmul, matmul, matmul_into

T = TypeVar("T")

# Logits held at a time. On the CPU as much as malloc keeps for the next chunk: blocks from 32 MiB on come fresh from
# the system every time, at a page fault each 4 KiB. On CUDA enough rows to keep tensor cores busy.
CHUNK_BYTES = MappingProxyType({"cpu": 31 << 20, "cuda": 1 << 30})
_ROWS_MULTIPLE = 64
# Columns that are widened to fp32 at a time where there is no product of narrow factors with a wide result.
_WIDENED_COLUMNS = 8192


@dataclass(frozen=True, kw_only=True)
class OutputHead:
    """Hidden states and this rank's part of the output weight."""

    hidden: Tensor  # [T, H]; under sequence parallelism this rank's slice of the sequence
    weight: Tensor  # [V, H]
    group: ProcessGroup | None  # ranks that hold the other columns
    sequence_parallel: bool

    def pick(self, rows: Tensor) -> Tensor:
        """Hidden states [C, H] of some rows of the sequence, gathered from the ranks that hold them. Collective."""
        if not self.sequence_parallel:
            return self.hidden.index_select(0, rows)
        local, mine = self.locate(rows)
        # Rows of other ranks are 0 here: the sum over ranks is the row, to the bit.
        picked = self.hidden.index_select(0, local).masked_fill(~mine[:, None], 0.0)
        dist.all_reduce(picked, group=self.group)
        return picked

    def locate(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(index of each row of the sequence in `hidden`, whether it is there); ignore the index of an absent row."""
        length = self.hidden.shape[0]
        local = rows - dist.get_rank(self.group) * length
        mine = (local >= 0) & (local < length)
        return local.clamp(0, length - 1), mine

    def logits(self, hidden: Tensor) -> Tensor:
        """[C, H] -> [C, V] in fp32 (fp64 for fp64): rounded to bf16 they would cost a log-prob up to 0.02."""
        weight = self.weight.detach()
        if hidden.dtype in (torch.float32, torch.float64):
            return matmul(hidden, weight.t())
        if hidden.device.type == "cuda":
            return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        wide = hidden.float()
        out = torch.empty(hidden.shape[0], weight.shape[0], device=hidden.device)
        for start in range(0, weight.shape[0], _WIDENED_COLUMNS):
            columns = slice(start, start + _WIDENED_COLUMNS)
            out[:, columns] = wide @ weight[columns].float().t()
        return out


class HeadGradients:
    """Adds up, chunk by chunk, the gradients of hidden states and weight."""

    def __init__(self, head: OutputHead, *, hidden: bool, weight: Tensor | None) -> None:
        """
        Args:
            hidden: whether the gradient of the hidden states is wanted.
            weight: where that of the weight is added, [V, H] fp32 (fp64 for fp64); None where it isn't wanted.
        """
        self.head = head
        self.weight = weight
        self.sums = new_accumulator(head.hidden) if hidden else None
        self.pending: tuple[Work, Tensor, Tensor] | None = None

    def add(self, rows: Tensor, hidden: Tensor, gradient: Tensor) -> None:
        """Add what a chunk gives.

        Args:
            rows: [C] of the sequence.
            hidden: [C, H], from `OutputHead.pick`.
            gradient: [C, V] of their logits.
        """
        # Tensor cores multiply what the weight is stored in; a wider factor would be cut down to it anyway.
        gradient = gradient.to(hidden.dtype)
        if self.weight is not None:
            _add_product(self.weight, gradient, hidden)
        if self.sums is None:
            return
        grad_hidden = matmul(gradient, self.head.weight.detach())
        if self.head.group is None:
            self.sums.index_add_(0, rows, grad_hidden.to(self.sums.dtype))
            return
        # Every rank's columns give a share. The sum travels while the next chunk is computed.
        self._wait()
        work = dist.all_reduce(grad_hidden, group=self.head.group, async_op=True)
        assert work is not None
        self.pending = work, rows, grad_hidden

    def of_hidden(self) -> Tensor | None:
        """[T, H] in the type of the hidden states, or None where it wasn't wanted."""
        self._wait()
        return None if self.sums is None else self.sums.to(self.head.hidden.dtype)

    def _wait(self) -> None:
        if self.pending is None:
            return
        assert self.sums is not None
        work, rows, grad_hidden = self.pending
        self.pending = None
        work.wait()  # Unbounded: the group has a time-out.
        if self.head.sequence_parallel:
            rows, mine = self.head.locate(rows)
            grad_hidden = grad_hidden.masked_fill(~mine[:, None], 0.0)
        self.sums.index_add_(0, rows, grad_hidden.to(self.sums.dtype))


def new_accumulator(tensor: Tensor) -> Tensor:
    """Zeros for the gradient of a tensor, wide enough to add up many chunks."""
    return torch.zeros(tensor.shape, dtype=wide_dtype(tensor), device=tensor.device)


def main_grad(weight: Tensor) -> Tensor | None:
    """Megatron's gradient buffer of a weight, where it has one that chunks may be added to."""
    buffer: Tensor | None = getattr(weight, "main_grad", None)
    return buffer if buffer is not None and buffer.dtype == wide_dtype(weight) else None


def rows_in_chunk(
    width: int, *, group: ProcessGroup | None, device: torch.device, chunk_bytes: int | None, num_alive: int = 1
) -> int:
    """How many rows of logits fit in `chunk_bytes` (see CHUNK_BYTES), at least one; the same on every rank of `group`.

    Collective: ranks whose shards differ in width must still cut the rows alike, as each chunk is exchanged.

    Args:
        width: columns of this rank's logits.
        num_alive: chunks that are there at a time.
    """
    if group is not None:
        widest = torch.tensor([width], device=device)
        dist.all_reduce(widest, op=dist.ReduceOp.MAX, group=group)
        width = int(widest)
    budget = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) if chunk_bytes is None else chunk_bytes
    most = max(1, budget // (4 * max(width, 1) * num_alive))
    return most - most % _ROWS_MULTIPLE if most > _ROWS_MULTIPLE else most


def cut(num_rows: int, *, most: int) -> list[slice]:
    """Chunks of at most `most` rows, nearly equal in size."""
    size = -(-num_rows // max(1, -(-num_rows // most)))
    if size > _ROWS_MULTIPLE:
        size = min(most, -(-size // _ROWS_MULTIPLE) * _ROWS_MULTIPLE)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, max(size, 1))]


def one_ahead(items: Iterable[T], *, ahead: bool) -> Iterator[T]:
    """The same items; with `ahead`, each is handed out after its successor was made, so that work overlaps."""
    if not ahead:
        yield from items
        return
    iterator = iter(items)
    try:
        current = next(iterator)
    except StopIteration:
        return
    for successor in iterator:
        yield current
        current = successor
    yield current


def check_head(
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    *,
    group: ProcessGroup | None,
    sequence_parallel: bool,
    chunk_bytes: int | None,
) -> Tensor:
    """The chosen rows, [R] int64: all where `rows` is left out.

    Raises:
        ValueError: naming the tensor, its shape and what was expected.
        TypeError: an argument is of another kind.
    """
    check_instance("hidden", hidden, Tensor)
    check_instance("weight", weight, Tensor)
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if tensor.layout != torch.strided:
            raise ValueError(f"{name} must be a dense tensor, got {tensor.layout}")
    if hidden.ndim != 2 or not hidden.is_floating_point():
        raise ValueError(f"hidden must be floating point [T, H], got {hidden.dtype} {list(hidden.shape)}")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1] or weight.dtype != hidden.dtype:
        raise ValueError(
            f"weight must be {hidden.dtype} [V, H] = [V, {hidden.shape[1]}] like hidden {list(hidden.shape)}, "
            f"got {weight.dtype} {list(weight.shape)}"
        )
    if weight.device != hidden.device:
        raise ValueError(f"weight is on {weight.device}, hidden on {hidden.device}: they must be on one device")
    if sequence_parallel and group is None:
        raise ValueError("sequence_parallel needs the group over which the sequence is spread, got None")
    if chunk_bytes is not None:
        check_count("chunk_bytes", chunk_bytes)
    length = hidden.shape[0] * (dist.get_world_size(group) if sequence_parallel else 1)
    if rows is None:
        return torch.arange(length, device=hidden.device)
    check_instance("rows", rows, Tensor)
    if rows.ndim != 1 or rows.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"rows must be int64 or int32 [R], got {rows.dtype} {list(rows.shape)}")
    if rows.device != hidden.device:
        raise ValueError(f"rows are on {rows.device}, hidden on {hidden.device}: they must be on one device")
    _check_in_range(rows, length)
    return rows.long()


def _check_in_range(rows: Tensor, length: int) -> None:
    # On CUDA indexing checks by itself; looking at values would wait for the device, and a traced graph has none.
    if torch.compiler.is_compiling() or rows.device.type != "cpu" or not len(rows):
        return
    lowest, highest = int(rows.min()), int(rows.max())
    if lowest < 0 or highest >= length:
        raise ValueError(f"rows must be in [0, {length}), got {lowest} to {highest}")


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """What log-probs and sums of a tensor are computed in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _add_product(out: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """out [V, H] += gradient^T [V, C] hidden [C, H]"""
    if has_matmul(out, gradient, hidden):
        matmul_into(gradient.t(), hidden, out, addend=out)
    elif out.dtype == gradient.dtype:
        out.addmm_(gradient.t(), hidden)
    elif out.device.type == "cuda":
        torch.addmm(out, gradient.t(), hidden, out_dtype=out.dtype, out=out)
    else:
        out.addmm_(gradient.to(out.dtype).t(), hidden.to(out.dtype))
