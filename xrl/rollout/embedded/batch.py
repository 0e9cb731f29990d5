"""The sequences that decode together, and their arrays: built when one joins or leaves, advanced in place otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from xrl.kernels.decode.decode_attention import PagedContext
from xrl.kernels.decode.packed_linear import padded_rows
from xrl.rollout.embedded import BLOCK_SIZE
from xrl.rollout.embedded.cache import KVCache
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

    @property
    def prompt(self) -> Sequence[int]:
        """The tokens before the response."""
        return self.request.token_ids[: self.prompt_length]

    @property
    def prompt_length(self) -> int:
        return len(self.request.token_ids) - self.request.num_drawn

    def new_sequence(self, sample: int) -> SequenceState:
        """Begin a sample; where the request goes on with an answer, with what is drawn of it already."""
        return SequenceState(job=self, sample=sample, token_ids=list(self.request.token_ids[self.prompt_length :]))

    def restart(self) -> None:
        """Forget all that was drawn: the batch that it was in is lost. The same tokens will be drawn again."""
        self.completions.clear()
        self.num_started = 0
        self.prompt_blocks, self.last_hidden = [], None


@dataclass(kw_only=True, eq=False, slots=True)
class SequenceState:
    """One sample, while it is decoded: a row of every batch that it is in."""

    job: Job
    sample: int  # index among the request's samples
    token_ids: list[int] = field(default_factory=list)  # response so far, with what the request brought of it
    logprobs: list[float] = field(default_factory=list)  # of those drawn here
    blocks: list[int] = field(default_factory=list)  # KV of the response, of all its tokens but the newest

    @property
    def needs_block(self) -> bool:
        """Whether the newest token begins a block."""
        return (len(self.token_ids) - 1) % BLOCK_SIZE == 0


class SamplingArrays:
    """Sampling settings of sequences, one entry a sequence."""

    def __init__(self, sequences: Sequence[SequenceState], device: torch.device) -> None:
        settings = [sequence.job.request.sampling for sequence in sequences]
        self.temperatures = torch.tensor([s.temperature for s in settings], dtype=torch.float32, device=device)
        self.top_k = torch.tensor([s.top_k for s in settings], dtype=torch.int64, device=device)
        self.top_p = torch.tensor([s.top_p for s in settings], dtype=torch.float32, device=device)
        self._seeds = np.array([s.seed for s in settings], dtype=np.int64)
        self._samples = np.array(
            [sequence.job.request.first_sample + sequence.sample for sequence in sequences], dtype=np.int64
        )
        self._device = device

    def uniforms(self, positions: np.ndarray) -> Tensor:
        """[N] fp64 for the tokens at these positions of the responses."""
        return torch.from_numpy(uniforms(self._seeds, self._samples, positions)).to(self._device)


class DecodeBatch:
    """Arrays of one decode step over `sequences`, padded to few distinct sizes.

    Sequences of one job are neighbours, so that they can read their prompt's keys and values together.
    """

    def __init__(self, sequences: Sequence[SequenceState], device: torch.device) -> None:
        self.sequences = list(sequences)
        self.sampling = SamplingArrays(self.sequences, device)
        self._device = device
        num_rows, size = len(self.sequences), padded_rows(len(self.sequences))
        jobs = [sequence.job for sequence in self.sequences]
        starts = [i for i in range(num_rows) if i == 0 or jobs[i] is not jobs[i - 1]]
        groups = [jobs[i] for i in starts]
        if size > num_rows:
            starts.append(num_rows)  # padding rows: a group without a prompt
        prompt_lengths = np.zeros(len(starts), dtype=np.int32)
        prompt_lengths[: len(groups)] = [job.prompt_length for job in groups]
        self._group_starts = self._tensor(np.array([*starts, size], dtype=np.int32))
        self._prompt_lengths = self._tensor(prompt_lengths)
        self._prompt_blocks = self._tensor(_table([job.prompt_blocks for job in groups], len(starts)))

        requests = [job.request for job in jobs]
        longest = max(request.num_drawn + request.sampling.max_new_tokens for request in requests)
        self._row_blocks = _table([sequence.blocks for sequence in self.sequences], size, -(-longest // BLOCK_SIZE))
        self._lengths = np.zeros(size, dtype=np.int32)
        self._lengths[:num_rows] = [len(sequence.token_ids) for sequence in self.sequences]
        self._prompts = np.array([job.prompt_length for job in jobs], dtype=np.int32)
        self._tokens = np.zeros(size, dtype=np.int32)
        self._positions = np.zeros(size, dtype=np.int32)
        self._slots = np.full(size, -1, dtype=np.int32)

    def prepare(self, cache: KVCache) -> tuple[Tensor, Tensor, Tensor, PagedContext]:
        """Give each sequence's newest token a slot in the cache: (tokens, positions, slots, context) of this step."""
        num_rows = len(self.sequences)
        newest = self._lengths[:num_rows] - 1  # index of the newest token in the response
        block, offset = newest // BLOCK_SIZE, newest % BLOCK_SIZE
        for i in (offset == 0).nonzero()[0]:
            sequence = self.sequences[i]
            sequence.blocks += cache.allocate(1)
            self._row_blocks[i, block[i]] = sequence.blocks[-1]
        self._tokens[:num_rows] = [sequence.token_ids[-1] for sequence in self.sequences]
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
        """[num sequences] random numbers for the tokens that this step draws."""
        return self.sampling.uniforms(self._lengths[: len(self.sequences)].astype(np.int64))

    def advance(self) -> None:
        """Count one token more for every sequence."""
        self._lengths[: len(self.sequences)] += 1

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)


def replay_arrays(
    sequences: Sequence[SequenceState], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, PagedContext]:
    """All tokens of the sequences but the newest, each a row of one decode step: (tokens, positions, slots, context).

    Each attends to its prompt and to the tokens of its response up to itself, in the order in which it did when it was
    new, so that its keys and values come out equal to the bit. They must all be written, a layer at a time, before any
    is read.

    Args:
        sequences: with at least two tokens each, and blocks for all but the newest.
    """
    counts = [len(sequence.token_ids) - 1 for sequence in sequences]
    num_tokens, size = sum(counts), padded_rows(sum(counts))
    tokens, positions, lengths = np.zeros((3, size), dtype=np.int32)
    slots = np.full(size, -1, dtype=np.int32)
    blocks = np.zeros((size, max(len(sequence.blocks) for sequence in sequences)), dtype=np.int32)
    starts = [0, *np.cumsum(counts).tolist()]
    for sequence, start, count in zip(sequences, starts, counts, strict=False):
        index, own = np.arange(count), np.array(sequence.blocks, dtype=np.int32)
        span = slice(start, start + count)
        tokens[span] = sequence.token_ids[:-1]
        positions[span] = sequence.job.prompt_length + index
        lengths[span] = index + 1
        slots[span] = own[index // BLOCK_SIZE] * BLOCK_SIZE + index % BLOCK_SIZE
        blocks[span, : len(own)] = own
    num_groups = len(sequences) + (size > num_tokens)  # padding rows: a group without a prompt
    prompt_lengths = np.zeros(num_groups, dtype=np.int32)
    prompt_lengths[: len(sequences)] = [sequence.job.prompt_length for sequence in sequences]
    group_starts = np.array(starts if size == num_tokens else [*starts, size], dtype=np.int32)

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    context = PagedContext(
        group_starts=tensor(group_starts),
        prompt_blocks=tensor(_table([sequence.job.prompt_blocks for sequence in sequences], num_groups)),
        prompt_lengths=tensor(prompt_lengths),
        row_blocks=tensor(blocks),
        row_lengths=tensor(lengths),
    )
    return tensor(tokens), tensor(positions), tensor(slots), context


def _table(block_lists: Sequence[Sequence[int]], num_rows: int, width: int = 1) -> np.ndarray:
    """[num_rows, width or more] int32 from lists of block ids; unused entries are 0, a block that exists."""
    table = np.zeros((num_rows, max([width, *map(len, block_lists)])), dtype=np.int32)
    for i, blocks in enumerate(block_lists):
        table[i, : len(blocks)] = blocks
    return table
