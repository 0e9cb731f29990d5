"""What is told of each step: its answers, its row of metrics, and whether anything was learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from xrl.checkpoint.samples import write_samples
from xrl.experience.experience import Batch
from xrl.metrics.journal import Journal
from xrl.metrics.learning import LearningWatch, record_of
from xrl.metrics.mean import merge
from xrl.metrics.memory import cuda_peak_bytes, peak_rss_bytes
from xrl.rollout.publisher import Published
from xrl.types import Mean, UpdateReport


class Bounds(Protocol):
    """How far answers may be from what the actor computes."""

    def judge(self, mismatch: float, *, rollout: int) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Listeners:
    """Who is told, on rank 0."""

    journal: Journal
    watch: LearningWatch
    mismatch: Bounds
    records_samples: bool = False  # what each step learns from is written down
    takes_norm: bool = True  # gradients are clipped; otherwise grad_norm is 0 and means nothing
    sees_every_change: bool = True  # engines see each change of a weight: in bf16 the main weights have smaller ones


class Reporter:
    """Writes one row a rollout, of all that rank 0 knows of it. Every rank takes part, for the memory of all."""

    def __init__(self, listeners: Listeners | None, control: ProcessGroup) -> None:
        """
        Args:
            listeners: on rank 0, None on the others.
            control: every rank.
        """
        self._listeners, self._control = listeners, control
        self._metrics: dict[str, float] = {}  # of the step that is under way
        self._updates: Sequence[UpdateReport] = ()
        self._num_updates = 0  # of the run

    def state_dict(self) -> dict[str, int]:
        """How many updates it has seen."""
        return {"num_updates": self._num_updates}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on counting."""
        self._num_updates = state["num_updates"]

    def taken(self, step: int, batch: Batch) -> None:
        """Write down every answer of a rollout that was sampled, judged and scored."""
        if self._listeners is None or batch.scored is None:
            return
        scored = batch.scored
        self._listeners.journal.rollout(step, batch.groups, scored.advantages, len(scored.samples), scored.metrics)
        self._metrics = dict(batch.metrics)
        if self._listeners.records_samples:
            path = self._listeners.journal.folder.samples(step)
            self._listeners.journal.record("samples", path, partial(write_samples, path, scored.samples))

    def learned(self, step: int, updates: Sequence[UpdateReport]) -> None:
        """Take note of what a rollout's updates did.

        Raises:
            MismatchFailed: the samples are not the actor's. On rank 0.
        """
        self._updates = updates
        # An algorithm of a user's own need not report it.
        if self._listeners and updates and "mismatch" in updates[0].metrics:
            self._listeners.mismatch.judge(updates[0].metrics["mismatch"].value, rollout=step)

    def published(self, step: int, published: Published, *, phases: Mapping[str, float], seconds: float) -> None:
        """Write a row of metrics for a rollout and all its updates, once the engines have the weights. Collective.

        Args:
            phases: seconds of learning, by phase.
            seconds: of the whole step.
        """
        memory = peak_memory(self._control)
        if self._listeners is None:
            return
        updates = self._updates
        row = {
            **self._metrics,
            **published.metrics,
            **update_metrics(updates),
            **memory,
            **{f"seconds/{phase}": value for phase, value in phases.items()},
            "step_seconds": seconds,
            "tokens_per_s": self._metrics["response_tokens"] / seconds,
        }
        journal = self._listeners.journal
        journal.step(step, row, [update_row(update) for update in updates] if len(updates) > 1 else [])
        if updates and not self._num_updates:
            journal.first_update(update_row(updates[0]))
        self._num_updates += len(updates)
        self._watch(self._listeners, step, row, published)

    def _watch(self, listeners: Listeners, step: int, row: Mapping[str, float], published: Published) -> None:
        """Warn where rollout after rollout teaches nothing."""
        norms = [update.grad_norm for update in self._updates]
        record = record_of(
            step,
            row,
            lr=max((update.lr for update in self._updates), default=0.0),
            grad_norm=max(norms, default=0.0) if listeners.takes_norm else None,
            weights_changed=published.changed or not listeners.sees_every_change,
        )
        for warning in listeners.watch.see(record):
            listeners.journal.warn(warning)


def update_row(update: UpdateReport) -> dict[str, float]:
    """What one of a rollout's several updates did."""
    metrics = {name: mean.value for name, mean in update.metrics.items()}
    return {**metrics, "grad_norm": update.grad_norm, "lr": update.lr}


def peak_memory(group: ProcessGroup) -> dict[str, float]:
    """Highest resident memory of all ranks and rollout workers, and of the fullest GPU, in GB. Collective."""
    resident = torch.tensor([peak_rss_bytes()], dtype=torch.float64)
    on_cuda = torch.tensor([cuda_peak_bytes()], dtype=torch.float64)
    dist.all_reduce(resident, op=dist.ReduceOp.SUM, group=group)
    dist.all_reduce(on_cuda, op=dist.ReduceOp.MAX, group=group)
    memory = {"memory_gb": resident.item() / 1e9}
    return {**memory, "cuda_memory_gb": on_cuda.item() / 1e9} if on_cuda.item() else memory


def update_metrics(updates: Sequence[UpdateReport]) -> dict[str, float]:
    """Of all updates of a rollout together."""
    metrics: Mapping[str, Mean] = {}
    for update in updates:
        metrics = merge(metrics, update.metrics)
    row = {name: mean.value for name, mean in metrics.items()}
    if updates:
        # Later updates no longer see the weights that sampled: only the first one's mismatch is the engines'.
        row |= {name: updates[0].metrics[name].value for name in ("mismatch", "mismatch_kl") if name in row}
        row["grad_norm"] = sum(update.grad_norm for update in updates) / len(updates)
        row["lr"] = updates[-1].lr
        row["train_tokens"] = float(sum(update.num_tokens for update in updates))
        row["computed_tokens"] = float(sum(update.computed_tokens for update in updates))
    return {**row, "updates": float(len(updates))}
