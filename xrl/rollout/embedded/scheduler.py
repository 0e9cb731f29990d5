"""Continuous batching (Orca, OSDI 2022): samples join and leave the batch between decode steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from xrl.kernels.decode.decode_layers import LayerStack
from xrl.kernels.decode.packed_linear import padded_rows
from xrl.rollout.embedded import BLOCK_SIZE, num_blocks
from xrl.rollout.embedded.batch import DecodeBatch, Job, SamplingArrays, SequenceState, replay_arrays
from xrl.rollout.embedded.cache import KVCache
from xrl.rollout.embedded.model import Decoder
from xrl.rollout.embedded.sampler import sample
from xrl.types import Completion, FinishReason

_PREFILL_TOKENS = 2048  # prompts computed in one pass hold about so many tokens
_LOGITS_BYTES = 64 << 20  # fp32 logits held at once


class Scheduler:
    """Takes jobs, runs them together, hands back those that are done. Used by one thread."""

    def __init__(self, decoder: Decoder, cache: KVCache, max_batch_size: int) -> None:
        self.decoder, self.cache, self.max_batch_size = decoder, cache, max_batch_size
        self.device = decoder.weights.device
        self._waiting: deque[Job] = deque()  # with samples that have not joined yet
        # Those that gave up their blocks, the oldest first; older than any waiting.
        self._preempted: deque[SequenceState] = deque()
        self.num_preemptions = 0
        # Those of one job are neighbours: jobs join first come, first served.
        self._running: list[SequenceState] = []
        self._batch: DecodeBatch | None = None  # of self._running; None when that has changed
        # Of the cache and the weights, while there are sequences: between them both may go, and must not be held here.
        self._layers: LayerStack | None = None

    @property
    def is_busy(self) -> bool:
        return bool(self._waiting or self._preempted or self._running)

    def add(self, job: Job) -> None:
        """Queue a job."""
        self._waiting.append(job)

    def step(self, weights_version: int) -> list[Job]:
        """Start what fits, decode one token of every running sample; return the jobs that are done."""
        done: list[Job] = []
        while self._start(weights_version, done):
            pass
        if self._running:
            self._make_room()
            self._decode(weights_version, done)
        return done

    def drop_aborted(self, weights_version: int) -> list[Job]:
        """End the samples of aborted jobs as they are; return the jobs that are done by that."""
        done: list[Job] = []
        for job in [job for job in self._waiting if job.aborted]:
            self._waiting.remove(job)
            while job.num_started < job.request.num_samples:
                sequence = job.new_sequence(job.num_started)
                job.num_started += 1
                self._finish(sequence, "abort", weights_version, done)
        kept: list[list[SequenceState]] = [[], []]
        for sequences, left in zip((self._running, self._preempted), kept, strict=True):
            for sequence in sequences:
                if sequence.job.aborted:
                    self._finish(sequence, "abort", weights_version, done)
                else:
                    left.append(sequence)
        self._preempted = deque(kept[1])
        self._set_running(kept[0])
        return done

    def _start(self, weights_version: int, done: list[Job]) -> bool:
        """Move samples into the batch, in the order in which they came, as many as fit; return whether any did.

        New ones get their first token drawn. Of others, what they have drawn is computed again.
        """
        sequences = self._admit()
        if not sequences:
            return False
        self._prefill(_jobs_without_prompt(sequences))
        self._replay([sequence for sequence in sequences if len(sequence.token_ids) > 1])
        new = [sequence for sequence in sequences if not sequence.token_ids]
        if new:
            hidden = torch.stack([sequence.job.last_hidden for sequence in new])  # type: ignore[misc]
            hidden = F.pad(hidden, (0, 0, 0, padded_rows(len(new)) - len(new)))
            settings = SamplingArrays(new, self.device)
            drawn = self._sample(hidden, settings, settings.uniforms(np.zeros(len(new), dtype=np.int64)))
            ended = set(new).difference(self._extend(new, drawn, weights_version, done))
            sequences = [sequence for sequence in sequences if sequence not in ended]
        self._set_running(self._running + sequences)
        return True

    def _admit(self) -> list[SequenceState]:
        """Take those that come next off the queues: as many as there are places, blocks and tokens of one pass for."""
        sequences: list[SequenceState] = []
        job: Job | None = None
        num_tokens = num_taken = 0
        while (self._preempted or self._waiting) and len(self._running) + len(sequences) < self.max_batch_size:
            sequence = self._preempted[0] if self._preempted else self._next_sample()
            needs_prompt = sequence.job is not job and not sequence.job.prompt_blocks
            tokens = max(0, len(sequence.token_ids) - 1) + (sequence.job.prompt_length if needs_prompt else 0)
            if sequences and tokens and num_tokens + tokens > _PREFILL_TOKENS:
                break
            blocks = num_blocks(max(1, len(sequence.token_ids)))
            blocks += num_blocks(sequence.job.prompt_length) if needs_prompt else 0
            # Each may need a block soon: none is to go for the newcomer's sake.
            others = len(self._running) + len(sequences)
            if not others and blocks > self.cache.num_available_blocks:
                self._free_idle_prompts(but=sequence.job)
            if num_taken + blocks + others > self.cache.num_available_blocks:
                break
            job, num_tokens, num_taken = sequence.job, num_tokens + tokens, num_taken + blocks
            sequences.append(sequence)
            if self._preempted:
                self._preempted.popleft()
                continue
            job.num_started += 1
            if job.num_started == job.request.num_samples:
                self._waiting.popleft()
        return sequences

    def _next_sample(self) -> SequenceState:
        return self._waiting[0].new_sequence(self._waiting[0].num_started)

    def _make_room(self) -> None:
        """See that every running sequence can have the block it needs: those that came last give theirs up for it."""
        while self.cache.num_available_blocks < len(self._running):  # quickly told, where there is enough
            if self.cache.num_available_blocks >= sum(sequence.needs_block for sequence in self._running):
                return
            if self._free_idle_prompts():
                continue
            sequence = self._running[-1]
            self._set_running(self._running[:-1])
            self.cache.free(sequence.blocks)
            sequence.blocks = []
            self._preempted.appendleft(sequence)
            self.num_preemptions += 1

    def _free_idle_prompts(self, but: Job | None = None) -> bool:
        """Free the prompts of jobs none of whose samples runs; return whether there was any."""
        running = {sequence.job for sequence in self._running}
        idle = {*self._waiting, *(sequence.job for sequence in self._preempted)} - running - {but}
        freed = False
        for job in idle:
            if job is not None and job.prompt_blocks:
                self.cache.free(job.prompt_blocks)
                job.prompt_blocks, freed = [], True
        return freed

    def _replay(self, sequences: Sequence[SequenceState]) -> None:
        """Compute again, together, the keys and values of what the sequences have drawn, in blocks of their own."""
        if not sequences:
            return
        for sequence in sequences:
            sequence.blocks = self.cache.allocate(num_blocks(len(sequence.token_ids) - 1))
        # Layer by layer: the decoder's way through all layers at once takes the sequences through in pieces.
        self.decoder.decode(*replay_arrays(sequences, self.device), cache=self.cache)

    def _prefill(self, jobs: Sequence[Job]) -> None:
        """Compute the prompts of `jobs`, together, each once."""
        if not jobs:
            return
        lengths = [job.prompt_length for job in jobs]
        size = padded_rows(sum(lengths))
        tokens, positions = np.zeros((2, size), dtype=np.int32)
        slots = np.full(size, -1, dtype=np.int32)
        responses = sum(min(job.request.num_samples, self.max_batch_size) * _longest(job) for job in jobs)
        # Sequences that run have taken only the blocks they have filled: the rest is theirs too.
        running = sum(_longest(sequence.job) - len(sequence.blocks) for sequence in self._running)
        self.cache.reserve(running + responses + sum(map(num_blocks, lengths)))
        start = 0
        for job, length in zip(jobs, lengths, strict=True):
            job.prompt_blocks = self.cache.allocate(num_blocks(length))
            index = np.arange(length)
            tokens[start : start + length] = job.prompt
            positions[start : start + length] = index
            blocks = np.array(job.prompt_blocks, dtype=np.int32)
            slots[start : start + length] = blocks[index // BLOCK_SIZE] * BLOCK_SIZE + index % BLOCK_SIZE
            start += length
        inputs = [torch.from_numpy(array).to(self.device) for array in (tokens, positions, slots)]
        hidden = self.decoder.prefill(*inputs, lengths=lengths, cache=self.cache)
        for job, last in zip(jobs, hidden, strict=True):
            job.last_hidden = last

    def _decode(self, weights_version: int, done: list[Job]) -> None:
        """Draw one more token for every running sequence."""
        if self._batch is None:
            self._batch = DecodeBatch(self._running, self.device)
        batch = self._batch
        step = batch.prepare(self.cache)  # which may have made the cache grow
        self._layers = self.decoder.dense_layers(self.cache, self._layers)
        hidden = self.decoder.decode(*step, cache=self.cache, layers=self._layers)
        drawn = self._sample(hidden, batch.sampling, batch.uniforms())
        batch.advance()
        remaining = self._extend(batch.sequences, drawn, weights_version, done)
        if len(remaining) < len(batch.sequences):
            self._set_running(remaining)

    def _sample(self, hidden: Tensor, settings: SamplingArrays, uniforms: Tensor) -> tuple[list[int], list[float]]:
        """Tokens and log-probs of N sequences from the first N hidden states, a bounded number of logits at a time."""
        step = max(32, _LOGITS_BYTES // (4 * self.decoder.shape.vocab_size) // 32 * 32)
        tokens: list[int] = []
        logprobs: list[float] = []
        for start in range(0, len(uniforms), step):
            rows = slice(start, start + step)
            ids, values = sample(
                self.decoder.logits(hidden[rows])[: len(uniforms) - start],
                settings.temperatures[rows],
                settings.top_k[rows],
                settings.top_p[rows],
                uniforms[rows],
            )
            tokens += ids.tolist()
            logprobs += values.tolist()
        return tokens, logprobs

    def _extend(
        self,
        sequences: Sequence[SequenceState],
        drawn: tuple[list[int], list[float]],
        weights_version: int,
        done: list[Job],
    ) -> list[SequenceState]:
        """Append a drawn token to each sequence; return the sequences that go on."""
        remaining = []
        for sequence, token, logprob in zip(sequences, *drawn, strict=True):
            sequence.token_ids.append(token)
            sequence.logprobs.append(logprob)
            sampling = sequence.job.request.sampling
            if token in sampling.stop_token_ids:
                self._finish(sequence, "stop", weights_version, done)
            elif len(sequence.logprobs) == sampling.max_new_tokens:
                self._finish(sequence, "length", weights_version, done)
            else:
                remaining.append(sequence)
        return remaining

    def _finish(self, sequence: SequenceState, reason: FinishReason, weights_version: int, done: list[Job]) -> None:
        """Turn a sequence into its completion and give its memory back; the job's too, after its last sequence."""
        job = sequence.job
        job.completions[sequence.sample] = Completion(
            token_ids=np.array(sequence.token_ids[job.request.num_drawn :], np.int32),
            logprobs=np.array(sequence.logprobs, np.float32),
            finish_reason=reason,
            weights_version=weights_version,
        )
        self.cache.free(sequence.blocks)
        if job.is_done:
            self.cache.free(job.prompt_blocks)
            job.prompt_blocks, job.last_hidden = [], None
            done.append(job)

    def _set_running(self, sequences: list[SequenceState]) -> None:
        self._running = sequences
        self._batch = None
        if not sequences:
            self._layers = None


def _jobs_without_prompt(sequences: Sequence[SequenceState]) -> list[Job]:
    """The sequences' jobs, each once, whose prompts are not in the cache."""
    return [job for job in dict.fromkeys(sequence.job for sequence in sequences) if not job.prompt_blocks]


def _longest(job: Job) -> int:
    """Blocks of a response that has all its tokens."""
    return num_blocks(job.request.num_drawn + job.request.sampling.max_new_tokens)
