"""A checksum of a bucket's bytes that sender and receiver compute alike, at about the speed of reading them once.

A tensor's bytes are taken as a table of 64-bit words, 1,024 to a row. Modulo 2^64:

    row sum    r_i = sum_j w_ij
    column sum c_j = sum_i w_ij
    tensor    t = sum_i mix(r_i, i) + sum_j mix(c_j, -1 - j)
    bucket    s = sum over tensors of mix(t, hash of name, dtype and shape)

A flipped bit changes its row's sum. Two different words that change places change the sums of two columns, or, within
one column, those of two rows. `mix` is not linear, so rows, columns and tensors that change places do not cancel out.
What is not noticed must keep every row's and every column's sum. The sums may be taken in any order: over threads,
blocks, tensors and processes. It finds accidents; it is no signature.

(A sum of products with fixed odd numbers, the usual choice, costs a multiplication more and is blind to words that
change places and differ in their highest bit alone: the sign of a number.)
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xrl.kernels.native import native_module
from xrl.kernels.threads import num_threads

Words = NDArray[np.uint64]

ROW_WORDS = 1024
ROW_BYTES = 8 * ROW_WORDS
# Rows looked at together: half a megabyte stays in a core's cache while it is read twice.
_CPU_ROWS = 64
# Starting threads pays for tensors that are larger than this: embeddings.
THREADS_FROM_BYTES = 64 << 20


def bucket_checksum(tensors: Mapping[str, Tensor]) -> str:
    """Checksum of whole tensors and their names, 16 hexadecimal digits; their order does not matter.

    Args:
        tensors: on any device; of a tensor that is not contiguous a copy is made.
    """
    return joined_checksum([partial_checksum(tensors)])


def take_bucket(tensors: Mapping[str, Tensor], destinations: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """The checksum of a bucket that arrived, and its tensors: those with a destination are copied there meanwhile.

    Args:
        destinations: name -> contiguous tensor. A tensor that differs in shape, dtype or device stays where it is.
    """
    total = np.zeros(1, dtype=np.uint64)
    taken = {}
    for name, tensor in tensors.items():
        target = destinations.get(name)
        if target is not None and _fits(tensor, target):
            total += _mix(_copy_with_checksum(tensor, target), _text_hash(name, tensor.dtype, tuple(tensor.shape)))
            taken[name] = target
        else:
            total += _mix(tensor_checksum(tensor), _text_hash(name, tensor.dtype, tuple(tensor.shape)))
            taken[name] = tensor
    return joined_checksum([int(total[0])]), taken


def partial_checksum(tensors: Mapping[str, Tensor]) -> int:
    """The share of some of a bucket's tensors in its checksum, in [-2^63, 2^63)."""
    total = np.zeros(1, dtype=np.uint64)
    for name, tensor in tensors.items():
        total += _mix(tensor_checksum(tensor), _text_hash(name, tensor.dtype, tuple(tensor.shape)))
    return int(total.view(np.int64)[0])


def joined_checksum(partial: Iterable[int]) -> str:
    """The bucket's checksum from the shares of all its tensors."""
    return f"{sum(partial) % 2**64:016x}"


@dataclass(frozen=True, kw_only=True)
class SummedTensor:
    """A tensor whose sums are taken as it is copied, and where they lie among those of its part of the model."""

    start: int  # word at which they begin
    num_sums: int  # words: of its rows, then of its columns
    text_hash: int

    @classmethod
    def of(cls, name: str, dtype: torch.dtype, shape: Sequence[int], *, start: int) -> SummedTensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        text_hash = int(_text_hash(name, dtype, tuple(shape))[0])
        return cls(start=start, num_sums=-(-num_bytes // ROW_BYTES) + ROW_WORDS, text_hash=text_hash)

    def in_share(self, share: Tensor) -> Tensor:
        """This tensor's slice of one copier's sums."""
        return share[self.start : self.start + self.num_sums]


def checksum_from_sums(shares: Sequence[Tensor], tensors: Iterable[SummedTensor]) -> int:
    """The share of some of a bucket's tensors in its checksum, as `partial_checksum`, from their row and column sums.

    Args:
        shares: int64 sums of all who copied a part, to be added up.
    """
    native = native_module()
    assert native is not None, "see can_sum"
    total: int = native.checksum_from_sums(
        [share.data_ptr() for share in shares],
        [(each.start, each.num_sums - ROW_WORDS, each.text_hash) for each in tensors],
    )
    return total


def can_sum(*lengths: int) -> bool:
    """Whether a `SummingCopy` takes pieces that begin at, and are as long as, so many bytes."""
    return native_module() is not None and all(length % 8 == 0 for length in lengths)


class SummingCopy:
    """Copies a piece of a tensor to its place, and adds its words to the tensor's sums in the same pass.

    The bytes go past the cache: they are many, and it is others who read them. May be done again and again, as long as
    the tensors' memory stays where it is.
    """

    def __init__(self, source: Tensor, target: Tensor, whole: Tensor, sums: Tensor) -> None:
        """
        Args:
            source: on the CPU.
            target: where it goes: a view of `whole` of the same shape and dtype as `source`.
            whole: a contiguous tensor.
            sums: the tensor's, int64 (see SummedTensor).

        Raises:
            ValueError: the two differ in shape or dtype.
        """
        if source.shape != target.shape or source.dtype != target.dtype:
            raise ValueError(
                f"{source.dtype} {list(source.shape)} cannot be copied to {target.dtype} {list(target.shape)}"
            )
        size = source.element_size()
        run = size  # bytes that follow each other in both
        dims = [
            (length, from_stride * size, to_stride * size)
            for length, from_stride, to_stride in zip(source.shape, source.stride(), target.stride(), strict=True)
            if length > 1
        ]
        while dims and dims[-1][1:] == (run, run):
            run *= dims.pop()[0]
        if not source.numel():
            run = 0
        offset = target.data_ptr() - whole.data_ptr()
        columns = sums.data_ptr() + 8 * (len(sums) - ROW_WORDS)
        self._arguments = {
            "source": source.data_ptr(),
            "target": whole.data_ptr(),
            "offset": offset,
            "num_bytes": run,
            "dimensions": dims,
            "rows": sums.data_ptr(),
            "columns": columns,
        }
        native = native_module()
        assert native is not None, "see can_sum"
        self._copy = native.copy_and_add_sums

    def run(self) -> None:
        """Raises ValueError for pieces that are no multiples of 8 bytes, see `can_sum`."""
        self._copy(**self._arguments)


def _fits(source: Tensor, target: Tensor) -> bool:
    return (
        source.shape == target.shape
        and source.dtype == target.dtype
        and source.device == target.device
        and source.is_contiguous()
        and target.is_contiguous()
    )


def _copy_with_checksum(source: Tensor, target: Tensor) -> Words:
    """`tensor_checksum` of the source, whose bytes go to the target in the same pass, where that can be."""
    native = native_module()
    if native is None or source.device.type != "cpu":
        target.copy_(source)
        return tensor_checksum(source)
    return np.array([_native_checksum(native, source, target)], dtype=np.uint64)


def _native_checksum(native: ModuleType, source: Tensor, target: Tensor | None) -> int:
    threads = num_threads() if source.nbytes >= THREADS_FROM_BYTES else 1
    where = 0 if target is None else target.data_ptr()
    checksum: int = native.tensor_checksum(
        bytes=source.data_ptr(), num_bytes=source.nbytes, target=where, num_threads=threads
    )
    return checksum


def tensor_checksum(tensor: Tensor) -> Words:
    """[1] checksum of a tensor's bytes, whatever they mean."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    native = native_module()
    if native is not None and flat.device.type == "cpu":
        return np.array([_native_checksum(native, flat, None)], dtype=np.uint64)
    num_rows = flat.numel() // ROW_BYTES
    body, tail = flat[: num_rows * ROW_BYTES], flat[num_rows * ROW_BYTES :]
    rows, columns = (_sums if flat.device.type == "cpu" else _device_sums)(body)
    if tail.numel():
        last = np.zeros(ROW_BYTES, dtype=np.uint8)
        last[: tail.numel()] = tail.cpu().numpy()
        words = last.view(np.uint64)
        rows = np.append(rows, np.add.reduce(words))
        columns = columns + words
    return _mix_sums(rows, columns)


def _mix_sums(rows: Words, columns: Words) -> Words:
    """[1] a tensor's checksum from its sums."""
    total: Words = _mix(rows, np.arange(len(rows), dtype=np.uint64)).sum(keepdims=True)
    return total + _mix(columns, ~np.arange(ROW_WORDS, dtype=np.uint64)).sum(keepdims=True)


def _sums(body: Tensor) -> tuple[Words, Words]:
    """Row sums [N] and column sums [ROW_WORDS] of N whole rows."""
    words = body.numpy().view(np.uint64).reshape(-1, ROW_WORDS)
    rows = np.empty(len(words), dtype=np.uint64)
    columns = np.zeros(ROW_WORDS, dtype=np.uint64)
    for start in range(0, len(words), _CPU_ROWS):
        part = words[start : start + _CPU_ROWS]
        np.add.reduce(part, axis=1, out=rows[start : start + _CPU_ROWS])
        columns += np.add.reduce(part, axis=0)
    return rows, columns


def _device_sums(body: Tensor) -> tuple[Words, Words]:
    """The same on an accelerator; integers wrap there too."""
    words = body.view(torch.int64).view(-1, ROW_WORDS)
    rows, columns = words.sum(1).cpu().numpy(), words.sum(0).cpu().numpy()
    return rows.view(np.uint64), columns.view(np.uint64)


@functools.lru_cache(maxsize=65_536)
def _text_hash(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Words:
    text = f"{name} {dtype} {list(shape)}"
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8).digest(), dtype=np.uint64)


def _mix(values: Words, indices: Words) -> Words:
    """Hash each value with its index (the finaliser of splitmix64, Steele et al., OOPSLA 2014)."""
    x = values ^ (indices * np.uint64(0x9E3779B97F4A7C15))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
