"""Continuous batching (Orca, OSDI 2022): samples join and leave the batch between decode steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from xrl.kernels.decode_layers import LayerStack
from xrl.kernels.packed_linear import padded_rows
from xrl.rollout.embedded.batch import DecodeBatch, Job, Row, SamplingArrays
from xrl.rollout.embedded.cache import BLOCK_SIZE, KVCache
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
        self._running: list[Row] = []  # rows of one job are neighbours: jobs join first come, first served
        self._batch: DecodeBatch | None = None  # of self._running; None when that has changed
        # Of the cache and the weights, while there are rows: between them both may go, and must not be held here.
        self._layers: LayerStack | None = None

    @property
    def is_busy(self) -> bool:
        return bool(self._waiting or self._running)

    def add(self, job: Job) -> None:
        """Queue a job."""
        self._waiting.append(job)

    def step(self, weights_version: int) -> list[Job]:
        """Start what fits, decode one token of every running sample; return the jobs that are done."""
        done: list[Job] = []
        while self._waiting and len(self._running) < self.max_batch_size:
            self._start(weights_version, done)
        if self._running:
            self._decode(weights_version, done)
        return done

    def drop_aborted(self, weights_version: int) -> list[Job]:
        """End the samples of aborted jobs as they are; return the jobs that are done by that."""
        done: list[Job] = []
        for job in [job for job in self._waiting if job.aborted]:
            self._waiting.remove(job)
            while job.num_started < job.request.num_samples:
                row = Row(job=job, sample=job.num_started)
                job.num_started += 1
                self._finish(row, "abort", weights_version, done)
        kept = []
        for row in self._running:
            if row.job.aborted:
                self._finish(row, "abort", weights_version, done)
            else:
                kept.append(row)
        self._set_running(kept)
        return done

    def _start(self, weights_version: int, done: list[Job]) -> None:
        """Move samples of the oldest waiting jobs into the batch, with their first token drawn."""
        rows: list[Row] = []
        prompts: list[Job] = []
        num_tokens = 0
        while self._waiting and len(self._running) + len(rows) < self.max_batch_size:
            job = self._waiting[0]
            if job.last_hidden is None:
                if prompts and num_tokens + len(job.request.token_ids) > _PREFILL_TOKENS:
                    break
                num_tokens += len(job.request.token_ids)
                prompts.append(job)
            room = self.max_batch_size - len(self._running) - len(rows)
            last = min(job.request.num_samples, job.num_started + room)
            rows += [Row(job=job, sample=sample) for sample in range(job.num_started, last)]
            job.num_started = last
            if last == job.request.num_samples:
                self._waiting.popleft()
        self._prefill(prompts)
        hidden = torch.stack([row.job.last_hidden for row in rows])  # type: ignore[misc]
        hidden = F.pad(hidden, (0, 0, 0, padded_rows(len(rows)) - len(rows)))
        settings = SamplingArrays(rows, self.device)
        drawn = self._sample(hidden, settings, settings.uniforms(np.zeros(len(rows), dtype=np.int64)))
        self._set_running(self._running + self._extend(rows, drawn, weights_version, done))

    def _prefill(self, jobs: Sequence[Job]) -> None:
        """Compute the prompts of `jobs`, together, each once."""
        if not jobs:
            return
        lengths = [len(job.request.token_ids) for job in jobs]
        size = padded_rows(sum(lengths))
        tokens, positions = np.zeros((2, size), dtype=np.int32)
        slots = np.full(size, -1, dtype=np.int32)
        responses = sum(
            min(job.request.num_samples, self.max_batch_size) * _num_blocks(job.request.sampling.max_new_tokens)
            for job in jobs
        )
        # Rows that run have taken only the blocks they have filled: the rest is theirs too.
        running = sum(_num_blocks(row.job.request.sampling.max_new_tokens) - len(row.blocks) for row in self._running)
        self.cache.reserve(running + responses + sum(map(_num_blocks, lengths)))
        start = 0
        for job, length in zip(jobs, lengths, strict=True):
            job.prompt_blocks = self.cache.allocate(_num_blocks(length))
            place = np.arange(length)
            tokens[start : start + length] = job.request.token_ids
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
            elif len(row.token_ids) == sampling.max_new_tokens:
                self._finish(row, "length", weights_version, done)
            else:
                remaining.append(row)
        return remaining

    def _finish(self, row: Row, reason: FinishReason, weights_version: int, done: list[Job]) -> None:
        """Turn a row into its completion and give its memory back; the job's too, after its last row."""
        job = row.job
        job.completions[row.sample] = Completion(
            token_ids=np.array(row.token_ids, np.int32),
            logprobs=np.array(row.logprobs, np.float32),
            finish_reason=reason,
            weights_version=weights_version,
        )
        self.cache.free(row.blocks)
        if job.is_done:
            self.cache.free(job.prompt_blocks)
            job.last_hidden = None
            done.append(job)

    def _set_running(self, rows: list[Row]) -> None:
        self._running = rows
        self._batch = None
        if not rows:
            self._layers = None


def _num_blocks(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_SIZE)
