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
from xrl.rollout.embedded.batch import DecodeBatch, Job, Row, SamplingArrays, replay_arrays
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
        self._preempted: deque[Row] = (
            deque()
        )  # those that gave up their blocks, the oldest first; older than any waiting
        self.num_preemptions = 0
        self._running: list[Row] = []  # rows of one job are neighbours: jobs join first come, first served
        self._batch: DecodeBatch | None = None  # of self._running; None when that has changed
        # Of the cache and the weights, while there are rows: between them both may go, and must not be held here.
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
                row = job.new_row(job.num_started)
                job.num_started += 1
                self._finish(row, "abort", weights_version, done)
        kept: list[list[Row]] = [[], []]
        for rows, left in zip((self._running, self._preempted), kept, strict=True):
            for row in rows:
                if row.job.aborted:
                    self._finish(row, "abort", weights_version, done)
                else:
                    left.append(row)
        self._preempted = deque(kept[1])
        self._set_running(kept[0])
        return done

    def _start(self, weights_version: int, done: list[Job]) -> bool:
        """Move samples into the batch, in the order in which they came, as many as fit; return whether any did.

        New ones get their first token drawn. Of others, what they have drawn is computed again.
        """
        rows = self._admit()
        if not rows:
            return False
        self._prefill(_jobs_without_prompt(rows))
        self._replay([row for row in rows if len(row.token_ids) > 1])
        new = [row for row in rows if not row.token_ids]
        if new:
            hidden = torch.stack([row.job.last_hidden for row in new])  # type: ignore[misc]
            hidden = F.pad(hidden, (0, 0, 0, padded_rows(len(new)) - len(new)))
            settings = SamplingArrays(new, self.device)
            drawn = self._sample(hidden, settings, settings.uniforms(np.zeros(len(new), dtype=np.int64)))
            ended = set(new).difference(self._extend(new, drawn, weights_version, done))
            rows = [row for row in rows if row not in ended]
        self._set_running(self._running + rows)
        return True

    def _admit(self) -> list[Row]:
        """Take those that come next off the queues: as many as there are places, blocks and tokens of one pass for."""
        rows: list[Row] = []
        job: Job | None = None
        num_tokens = num_taken = 0
        while (self._preempted or self._waiting) and len(self._running) + len(rows) < self.max_batch_size:
            row = self._preempted[0] if self._preempted else self._next_sample()
            needs_prompt = row.job is not job and not row.job.prompt_blocks
            tokens = max(0, len(row.token_ids) - 1) + (row.job.prompt_length if needs_prompt else 0)
            if rows and tokens and num_tokens + tokens > _PREFILL_TOKENS:
                break
            blocks = num_blocks(max(1, len(row.token_ids))) + (num_blocks(row.job.prompt_length) if needs_prompt else 0)
            others = len(self._running) + len(rows)  # each may need a block soon: none is to go for the newcomer's sake
            if not others and blocks > self.cache.num_available_blocks:
                self._free_idle_prompts(but=row.job)
            if num_taken + blocks + others > self.cache.num_available_blocks:
                break
            job, num_tokens, num_taken = row.job, num_tokens + tokens, num_taken + blocks
            rows.append(row)
            if self._preempted:
                self._preempted.popleft()
                continue
            job.num_started += 1
            if job.num_started == job.request.num_samples:
                self._waiting.popleft()
        return rows

    def _next_sample(self) -> Row:
        return self._waiting[0].new_row(self._waiting[0].num_started)

    def _make_room(self) -> None:
        """See that every running row can have the block that it needs: those that came last give theirs up for it."""
        while self.cache.num_available_blocks < len(self._running):  # quickly told, where there is enough
            if self.cache.num_available_blocks >= sum(row.needs_block for row in self._running):
                return
            if self._free_idle_prompts():
                continue
            row = self._running[-1]
            self._set_running(self._running[:-1])
            self.cache.free(row.blocks)
            row.blocks = []
            self._preempted.appendleft(row)
            self.num_preemptions += 1

    def _free_idle_prompts(self, but: Job | None = None) -> bool:
        """Free the prompts of jobs none of whose samples runs; return whether there was any."""
        running = {row.job for row in self._running}
        idle = {*self._waiting, *(row.job for row in self._preempted)} - running - {but}
        freed = False
        for job in idle:
            if job is not None and job.prompt_blocks:
                self.cache.free(job.prompt_blocks)
                job.prompt_blocks, freed = [], True
        return freed

    def _replay(self, rows: Sequence[Row]) -> None:
        """Compute again, together, the keys and values of what the rows have drawn, in blocks of their own."""
        if not rows:
            return
        for row in rows:
            row.blocks = self.cache.allocate(num_blocks(len(row.token_ids) - 1))
        # Layer by layer: the decoder's way through all layers at once takes the rows through in pieces.
        self.decoder.decode(*replay_arrays(rows, self.device), cache=self.cache)

    def _prefill(self, jobs: Sequence[Job]) -> None:
        """Compute the prompts of `jobs`, together, each once."""
        if not jobs:
            return
        lengths = [job.prompt_length for job in jobs]
        size = padded_rows(sum(lengths))
        tokens, positions = np.zeros((2, size), dtype=np.int32)
        slots = np.full(size, -1, dtype=np.int32)
        responses = sum(min(job.request.num_samples, self.max_batch_size) * _longest(job) for job in jobs)
        # Rows that run have taken only the blocks they have filled: the rest is theirs too.
        running = sum(_longest(row.job) - len(row.blocks) for row in self._running)
        self.cache.reserve(running + responses + sum(map(num_blocks, lengths)))
        start = 0
        for job, length in zip(jobs, lengths, strict=True):
            job.prompt_blocks = self.cache.allocate(num_blocks(length))
            place = np.arange(length)
            tokens[start : start + length] = job.prompt
            positions[start : start + length] = place
            blocks = np.array(job.prompt_blocks, dtype=np.int32)
            slots[start : start + length] = blocks[place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE
            start += length
        inputs = [torch.from_numpy(array).to(self.device) for array in (tokens, positions, slots)]
        hidden = self.decoder.prefill(*inputs, lengths=lengths, cache=self.cache)
        for job, last in zip(jobs, hidden, strict=True):
            job.last_hidden = last

    def _decode(self, weights_version: int, done: list[Job]) -> None:
        """Draw one more token for every running row."""
        if self._batch is None:
            self._batch = DecodeBatch(self._running, self.device)
        batch = self._batch
        step = batch.prepare(self.cache)  # which may have made the cache grow
        self._layers = self.decoder.dense_layers(self.cache, self._layers)
        hidden = self.decoder.decode(*step, cache=self.cache, layers=self._layers)
        drawn = self._sample(hidden, batch.sampling, batch.uniforms())
        batch.advance()
        remaining = self._extend(batch.rows, drawn, weights_version, done)
        if len(remaining) < len(batch.rows):
            self._set_running(remaining)

    def _sample(self, hidden: Tensor, settings: SamplingArrays, uniforms: Tensor) -> tuple[list[int], list[float]]:
        """Tokens and log-probs of N rows from the first N final hidden states, a bounded number of logits at a time."""
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
        self, rows: Sequence[Row], drawn: tuple[list[int], list[float]], weights_version: int, done: list[Job]
    ) -> list[Row]:
        """Append a drawn token to each row; return the rows that go on."""
        remaining = []
        for row, token, logprob in zip(rows, *drawn, strict=True):
            row.token_ids.append(token)
            row.logprobs.append(logprob)
            sampling = row.job.request.sampling
            if token in sampling.stop_token_ids:
                self._finish(row, "stop", weights_version, done)
            elif len(row.logprobs) == sampling.max_new_tokens:
                self._finish(row, "length", weights_version, done)
            else:
                remaining.append(row)
        return remaining

    def _finish(self, row: Row, reason: FinishReason, weights_version: int, done: list[Job]) -> None:
        """Turn a row into its completion and give its memory back; the job's too, after its last row."""
        job = row.job
        job.completions[row.sample] = Completion(
            token_ids=np.array(row.token_ids[job.request.num_drawn :], np.int32),
            logprobs=np.array(row.logprobs, np.float32),
            finish_reason=reason,
            weights_version=weights_version,
        )
        self.cache.free(row.blocks)
        if job.is_done:
            self.cache.free(job.prompt_blocks)
            job.prompt_blocks, job.last_hidden = [], None
            done.append(job)

    def _set_running(self, rows: list[Row]) -> None:
        self._running = rows
        self._batch = None
        if not rows:
            self._layers = None


def _jobs_without_prompt(rows: Sequence[Row]) -> list[Job]:
    """The rows' jobs, each once, whose prompts are not in the cache."""
    return [job for job in dict.fromkeys(row.job for row in rows) if not job.prompt_blocks]


def _longest(job: Job) -> int:
    """Blocks of a response that has all its tokens."""
    return num_blocks(job.request.num_drawn + job.request.sampling.max_new_tokens)
