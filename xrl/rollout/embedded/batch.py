"""The rows that decode together, and their arrays: built when rows join or leave, advanced in place otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from xrl.kernels.decode_attention import PagedContext
from xrl.kernels.packed_linear import padded_rows
from xrl.rollout.embedded.cache import BLOCK_SIZE, KVCache
from xrl.rollout.embedded.sampler import uniforms
from xrl.types import Completion, GenerateRequest


@dataclass(kw_only=True, eq=False)
class Job:
    """A request on its way: the prompt, computed once, and the samples drawn from it."""

    request: GenerateRequest
    future: Future[list[Completion]]
    completions: dict[int, Completion] = field(default_factory=dict)  # sample index -> answer
    num_started: int = 0  # samples that have joined the batch
    prompt_blocks: list[int] = field(default_factory=list)  # KV of the prompt, shared by the samples
    last_hidden: Tensor | None = None  # [H] at the prompt's last token, once computed
    aborted: bool = False

    @property
    def is_done(self) -> bool:
        return len(self.completions) == self.request.num_samples

    def restart(self) -> None:
        """Forget all that was drawn: the batch that it was in is lost. The same tokens will be drawn again."""
        self.completions.clear()
        self.num_started = 0
        self.prompt_blocks, self.last_hidden = [], None


@dataclass(kw_only=True, eq=False, slots=True)
class Row:
    """One sample being decoded."""

    job: Job
    sample: int  # index among the request's samples
    token_ids: list[int] = field(default_factory=list)  # response so far
    logprobs: list[float] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)  # KV of the response


class SamplingArrays:
    """Sampling settings of rows, one entry a row."""

    def __init__(self, rows: Sequence[Row], device: torch.device) -> None:
        settings = [row.job.request.sampling for row in rows]
        self.temperatures = torch.tensor([s.temperature for s in settings], dtype=torch.float32, device=device)
        self.top_k = torch.tensor([s.top_k for s in settings], dtype=torch.int64, device=device)
        self.top_p = torch.tensor([s.top_p for s in settings], dtype=torch.float32, device=device)
        self._seeds = np.array([s.seed for s in settings], dtype=np.int64)
        self._samples = np.array([row.job.request.first_sample + row.sample for row in rows], dtype=np.int64)
        self._num_drawn = np.array([row.job.request.num_drawn for row in rows], dtype=np.int64)
        self._device = device

    def uniforms(self, lengths: np.ndarray) -> Tensor:
        """[N] fp64 for the next tokens of rows that have drawn so many since their requests came."""
        return torch.from_numpy(uniforms(self._seeds, self._samples, self._num_drawn + lengths)).to(self._device)


class DecodeBatch:
    """Arrays of one decode step over `rows`, padded to few distinct sizes.

    Rows of one job are neighbours, so that they can read their prompt's keys and values together.
    """

    def __init__(self, rows: Sequence[Row], device: torch.device) -> None:
        self.rows = list(rows)
        self.sampling = SamplingArrays(self.rows, device)
        self._device = device
        num_rows, size = len(self.rows), padded_rows(len(self.rows))
        jobs = [row.job for row in self.rows]
        starts = [i for i in range(num_rows) if i == 0 or jobs[i] is not jobs[i - 1]]
        groups = [jobs[i] for i in starts]
        if size > num_rows:
            starts.append(num_rows)  # padding rows: a group without a prompt
        prompt_lengths = np.zeros(len(starts), dtype=np.int32)
        prompt_lengths[: len(groups)] = [len(job.request.token_ids) for job in groups]
        self._group_starts = self._tensor(np.array([*starts, size], dtype=np.int32))
        self._prompt_lengths = self._tensor(prompt_lengths)
        self._prompt_blocks = self._tensor(_table([job.prompt_blocks for job in groups], len(starts)))

        longest = max(row.job.request.sampling.max_new_tokens for row in self.rows)
        self._row_blocks = _table([row.blocks for row in self.rows], size, -(-longest // BLOCK_SIZE))
        self._lengths = np.zeros(size, dtype=np.int32)
        self._lengths[:num_rows] = [len(row.token_ids) for row in self.rows]
        self._prompts = np.array([len(job.request.token_ids) for job in jobs], dtype=np.int32)
        self._tokens = np.zeros(size, dtype=np.int32)
        self._positions = np.zeros(size, dtype=np.int32)
        self._slots = np.full(size, -1, dtype=np.int32)

    def prepare(self, cache: KVCache) -> tuple[Tensor, Tensor, Tensor, PagedContext]:
        """Give each row's newest token a place in the cache: (tokens, positions, slots, context) of this step."""
        num_rows = len(self.rows)
        newest = self._lengths[:num_rows] - 1  # index of the newest token in the response
        block, offset = newest // BLOCK_SIZE, newest % BLOCK_SIZE
        for i in (offset == 0).nonzero()[0]:
            row = self.rows[i]
            row.blocks += cache.allocate(1)
            self._row_blocks[i, block[i]] = row.blocks[-1]
        self._tokens[:num_rows] = [row.token_ids[-1] for row in self.rows]
        self._positions[:num_rows] = self._prompts + newest
        self._slots[:num_rows] = self._row_blocks[np.arange(num_rows), block] * BLOCK_SIZE + offset
        context = PagedContext(
            group_starts=self._group_starts,
            prompt_blocks=self._prompt_blocks,
            prompt_lengths=self._prompt_lengths,
            row_blocks=self._tensor(self._row_blocks[:, : block.max() + 1]),
            row_lengths=self._tensor(self._lengths),
        )
        return self._tensor(self._tokens), self._tensor(self._positions), self._tensor(self._slots), context

    def uniforms(self) -> Tensor:
        """[num rows] random numbers for the tokens that this step draws."""
        return self.sampling.uniforms(self._lengths[: len(self.rows)].astype(np.int64))

    def advance(self) -> None:
        """Every row has one token more."""
        self._lengths[: len(self.rows)] += 1

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def _table(block_lists: Sequence[Sequence[int]], num_rows: int, width: int = 1) -> np.ndarray:
    """[num_rows, width or more] int32 from lists of block ids; unused entries are 0, a block that exists."""
    table = np.zeros((num_rows, max([width, *map(len, block_lists)])), dtype=np.int32)
    for i, blocks in enumerate(block_lists):
        table[i, : len(blocks)] = blocks
    return table
