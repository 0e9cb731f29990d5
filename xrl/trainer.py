"""One GRPO step, top to bottom, and the loop around it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from xrl.actor.actor import Actor, UpdateReport
from xrl.algorithms import Algorithm
from xrl.config import Settings
from xrl.data.prompts import PromptDataset
from xrl.files.disk import NotWritten
from xrl.kernels.native import native_module
from xrl.launch.exit import RunEnded
from xrl.launch.progress import Progress
from xrl.metrics.journal import Journal
from xrl.metrics.learning import LearningWatch, record_of
from xrl.metrics.learning_words import what_is_left
from xrl.metrics.mean import merge
from xrl.metrics.memory import cuda_peak_bytes, peak_rss_bytes, return_freed_memory
from xrl.parallel.groups import ParallelGroups
from xrl.rollout.canary import Canary
from xrl.rollout.collect import Collected, Collector
from xrl.rollout.evaluate import Evaluator
from xrl.rollout.mismatch import MismatchBounds
from xrl.rollout.publish import NoneUpdated, Publisher
from xrl.types import Mean, Sample, SamplingParams
from xrl.weights.checkpoints import Checkpoints

logger = logging.getLogger("xrl")
T = TypeVar("T")

# What rank 0 says to the others while it works with the engines.
_DONE, _REPUBLISH = 0, 1
# What it says between two rollouts: go on, save and go on, end here, or end here and save weights that earlier rollouts
# have changed. Of a save at the end: it is done, is tried again, or has failed. After an update of the engines: go on,
# end here, or once more.
_GO_ON, _SAVE, _END, _SAVE_AND_END, _AGAIN = 0, 1, 2, 3, 4


@dataclass(frozen=True, kw_only=True)
class Lead:
    """What only rank 0 has: prompts, rollout workers behind a collector, and the run's files."""

    prompts: PromptDataset
    sampling: SamplingParams
    collector: Collector
    publisher: Publisher
    canary: Canary | None
    mismatch: MismatchBounds
    evaluator: Evaluator | None
    journal: Journal
    checkpoints: Checkpoints
    watch: LearningWatch


class Trainer:
    """Runs on every rank alike; rank 0 also leads: it samples, judges and writes."""

    def __init__(
        self,
        settings: Settings,
        groups: ParallelGroups,
        actor: Actor,
        algorithm: Algorithm,
        lead: Lead | None,
        *,
        num_rollouts: int,
        progress: Progress | None = None,
    ) -> None:
        """
        Args:
            progress: is told what this rank is at.
        """
        self.settings = settings
        self.progress = progress or Progress()
        self.groups = groups
        self.actor = actor
        self.algorithm = algorithm
        self.lead = lead
        self.num_rollouts = num_rollouts
        self.shares_memory = (
            settings.rollout.chosen_transport == "shared_memory"
            and groups.device.type == "cpu"
            and native_module() is not None
            and int(os.environ.get("LOCAL_WORLD_SIZE", groups.layout.world_size)) == groups.layout.world_size
        )
        self.version = 0  # of the weights that the engines have
        # Filled on rank 0 while a step runs, then written as one row.
        self.row: dict[str, float] = {}
        self.checksums: tuple[str, ...] = ()  # of the weights that the engines have, on rank 0
        self.weights_changed = False  # by the last publication
        self.num_updates = 0
        if lead:
            lead.collector.pool.recover = self.republish

    def train(self) -> None:
        """Train from the first rollout to `hf-final`."""
        evaluation = self.settings.evaluation
        self.publish(version=0)
        self.evaluate(0)
        for index in range(1, self.num_rollouts + 1):
            self.step(index)
            is_last = index == self.num_rollouts
            if not is_last:
                self.save_or_end(index)
            if evaluation.eval_interval and index % evaluation.eval_interval == 0 and not is_last:
                self.evaluate(index)
        self.save_at_last("hf-final")
        self.evaluate(self.num_rollouts)
        if self.lead:
            self.lead.journal.finish()
        self.end_as_failed_if_useless()

    def step(self, index: int) -> None:
        """Sample, judge, score, learn, publish.

        Raises:
            MismatchFailed: the samples are not the actor's. On rank 0.
        """
        start = time.perf_counter()
        self.progress.enter(f"rollout {index}")
        samples = self.with_engines(lambda: self.sample(index))
        self.take_device()
        self.progress.enter(f"update {index}")
        reports = self.actor.learn(samples, self.algorithm)
        if self.lead and reports:  # before anybody gets to see the new weights
            self.lead.mismatch.judge(reports[0].metrics["mismatch"].value, rollout=index)
        return_freed_memory()  # to the rollout workers, whose turn it is now
        self.publish(version=index)
        self.report(index, reports, seconds=time.perf_counter() - start)

    def sample(self, index: int) -> list[Sample]:
        """Answers to the next prompts, judged and scored. Rank 0 only."""
        assert self.lead is not None
        batch, rollout = self.settings.data.rollout_batch_size, self.settings.rollout
        collected = self.lead.collector.collect(
            self.lead.prompts.next_batch(max(0, self.settings.prompts_in_flight - self.lead.collector.num_carried)),
            # Every rollout draws anew, and the same run draws the same again.
            sampling=dataclasses.replace(self.lead.sampling, seed=self.lead.sampling.seed + index),
            num_samples=self.settings.data.samples_per_prompt,
            description="training samples",
            enough=batch if rollout.partial_rollout else None,
        )
        refuse_useless(index, collected)
        scored = self.algorithm.score(collected.groups)
        self.lead.journal.rollout(index, collected.groups, scored.advantages, len(scored.samples), scored.metrics)
        self.row = {
            **scored.metrics,
            "prompts/failed": float(collected.counts.failed),
            "prompts/retried": float(collected.counts.retried),
            "prompts/unfinished": float(collected.counts.unfinished),
            "prompts/stale": float(collected.counts.stale),
            "samples/total": float(sum(len(group.rollouts) for group in collected.groups)),
            "samples/empty": float(_num_empty(collected)),
            "samples/continued": float(_num_continued(collected)),
            "epoch": float(self.lead.prompts.epoch),
            "response_tokens": float(collected.num_tokens),
            "tokens_per_s/rollout": collected.num_tokens / collected.seconds,
            "seconds/rollout": collected.seconds,
        }
        return scored.samples

    def publish(self, *, version: int) -> None:
        """Stream the weights to every rollout worker; anew where all of them were lost over it. Collective.

        Raises:
            WorkerGone: on rank 0, and RunEnded on the others: they were lost each time, as often as one is restarted.
        """
        self.version = version
        self.progress.enter(f"weights version {version} to the engines")
        before, start = self.checksums, time.perf_counter()
        for tries_left in reversed(range(1 + self.settings.rollout.rollout_max_restarts)):
            self.stream_weights()
            self.row["seconds/publish"] = time.perf_counter() - start
            if self.lead and self.settings.rollout.colocate:
                with self.turning():
                    self.lead.collector.pool.wake()
            self.check_canary()
            has_workers = self.lead is None or bool(self.lead.collector.pool.ready())
            choice = self._agree(_GO_ON if has_workers else _AGAIN if tries_left else _END)
            if choice != _AGAIN:
                break
            logger.warning("weights version %d have no rollout worker any more: they are published anew", version)
        if choice == _END:
            raise self.lead.collector.pool.none_left() if self.lead else RunEnded()
        self.weights_changed = self.checksums != before

    def stream_weights(self) -> None:
        """The weights to all workers there are, once. Collective: each rank gives its part."""
        self.give_device()
        if self.shares_memory:
            buckets = self.actor.shared_weights(self.lead.publisher.memory if self.lead else None, version=self.version)
        else:
            buckets = self.actor.weights(version=self.version)
        if self.lead:
            try:
                report = self.lead.publisher.publish(self.progress.through(buckets), version=self.version)
            except NoneUpdated as error:
                logger.error("%s", error)
            else:
                self.checksums = report.checksums
                self.row |= {
                    "sync/gigabytes": report.num_bytes / 1e9,
                    "sync/layers": float(report.num_layers),
                    "sync/resent": float(report.num_resent),
                    "workers/updated": float(report.num_workers),
                }
        # Little or nothing is left of them on rank 0; the other ranks get nothing but must take part.
        for _ in buckets:
            pass

    def with_engines(self, action: Callable[[], T]) -> T | None:
        """Let rank 0 ask something of the engines; the others wait, and help if the weights are to be published again.

        Collective. What rank 0 got, None on the others.
        """
        if self.lead:
            result = action()
            self._tell(_DONE)
            return result
        while self._told() == _REPUBLISH:
            self.publish(version=self.version)
        return None

    def republish(self) -> None:
        """Within `with_engines`, on rank 0: no worker is ready; give the weights to those that can take them."""
        assert self.lead is not None
        logger.warning("no rollout worker is ready: weights version %d are published once more", self.version)
        self._tell(_REPUBLISH)
        self.publish(version=self.version)

    def _tell(self, what: int) -> None:
        dist.broadcast(torch.tensor([what]), group_src=0, group=self.groups.control)

    def _told(self) -> int:
        what = torch.zeros(1, dtype=torch.long)
        dist.broadcast(what, group_src=0, group=self.groups.control)
        return int(what)

    def take_device(self) -> None:
        """Where engines and actor share devices: engines go to sleep, what training needs comes back. Collective."""
        if not self.settings.rollout.colocate:
            return
        with self.turning():
            if self.lead:
                self.lead.collector.pool.sleep()
            dist.barrier(self.groups.control)  # what one gives up is free before the other takes it
            self.actor.memory.restore()

    def give_device(self) -> None:
        """The opposite, but for waking the engines: they take the new weights first. Collective."""
        if not self.settings.rollout.colocate:
            return
        with self.turning():
            self.actor.memory.offload()
            dist.barrier(self.groups.control)
            if self.lead:  # before the first update, and for workers that were started again meanwhile
                self.lead.collector.pool.sleep()

    @contextlib.contextmanager
    def turning(self) -> Iterator[None]:
        """Count the seconds that turns take."""
        start = time.perf_counter()
        yield
        self.row["seconds/turns"] = self.row.get("seconds/turns", 0.0) + time.perf_counter() - start

    def check_canary(self) -> None:
        """Let the actor score what each worker samples with its new weights. Collective.

        Raises:
            CanaryFailed: they do not compute the same. On rank 0.
        """
        if not self.settings.rollout.canary_tokens:
            return
        start = time.perf_counter()
        differences = self.actor.mismatch(self.lead.canary.sample() if self.lead and self.lead.canary else None)
        if self.lead and self.lead.canary and differences:  # without: no worker is left
            self.row["canary"] = self.lead.canary.judge(differences)
        self.row["seconds/canary"] = time.perf_counter() - start

    def evaluate(self, index: int) -> None:
        """Pass rates on held-out prompts. Collective."""
        self.progress.enter(f"evaluation after rollout {index}")
        found = self.with_engines(lambda: self.lead.evaluator.evaluate() if self.lead and self.lead.evaluator else None)
        if self.lead and found is not None:
            self.lead.journal.evaluation(index, found)

    def save(self, name: str) -> NotWritten | None:
        """Write a Hugging Face folder below the run's; on rank 0, why it is not there if it is not. Collective."""
        self.progress.enter(f"saving {name}")
        buckets = self.progress.through(self.actor.weights(version=self.num_rollouts))
        if not self.lead:
            for _ in buckets:  # the other ranks get nothing but must take part
                pass
            return None
        fault = self.lead.checkpoints.write(name, buckets)
        if fault is None:
            self.lead.journal.say(f"saved {self.lead.journal.folder.path / name}")
        return fault

    def save_at_last(self, name: str) -> None:
        """Save weights that would be lost otherwise: tried again while there is hope for it. Collective.

        Raises:
            RunEnded: they could not be saved, on every rank; rank 0 says why.
        """
        choice = _SAVE
        while choice == _SAVE:
            fault = self.save(name)
            if self.lead and fault is not None:
                choice = _SAVE if self.lead.checkpoints.wait_for_room(fault) else _END
            else:
                choice = _GO_ON
            choice = self._agree(choice)
        if choice == _END:
            sentence = self.lead.checkpoints.words_about_loss(fault) if self.lead and fault else ""
            raise RunEnded(sentence, says_where=True)

    def report(self, index: int, reports: Sequence[UpdateReport], *, seconds: float) -> None:
        """One row of metrics for the rollout and all its updates."""
        memory = peak_memory(self.groups)
        if not self.lead:
            return
        metrics: Mapping[str, Mean] = {}
        for update in reports:
            metrics = merge(metrics, update.metrics)
        row = {**self.row, **{name: mean.value for name, mean in metrics.items()}, **memory}
        if reports:
            # Later updates no longer see the weights that sampled: only the first one's mismatch is the engines'.
            row |= {name: reports[0].metrics[name].value for name in ("mismatch", "mismatch_kl")}
            row["grad_norm"] = sum(update.grad_norm for update in reports) / len(reports)
            row["lr"] = reports[-1].lr
            row["train_tokens"] = float(sum(update.num_tokens for update in reports))
            row["computed_tokens"] = float(sum(update.computed_tokens for update in reports))
        row["updates"] = float(len(reports))
        pool = self.lead.collector.pool
        row |= {"workers/lost": float(pool.num_lost), "workers/restarted": float(pool.num_restarted)}
        row |= {f"seconds/{phase}": value for phase, value in self.actor.seconds.items()}
        row["step_seconds"] = seconds
        row["tokens_per_s"] = row["response_tokens"] / seconds
        self.lead.journal.step(index, row, [update_row(update) for update in reports] if len(reports) > 1 else [])
        if reports and not self.num_updates:
            self.lead.journal.first_update(update_row(reports[0]))
        self.num_updates += len(reports)
        self.watch(index, row, reports)

    def watch(self, index: int, row: Mapping[str, float], reports: Sequence[UpdateReport]) -> None:
        """Warn where rollout after rollout teaches nothing. Rank 0 only."""
        assert self.lead is not None
        takes_norm = self.settings.optimizer.clip_grad > 0  # without clipping grad_norm is 0 and means nothing
        record = record_of(
            index,
            row,
            lr=max((update.lr for update in reports), default=0.0),
            grad_norm=max((update.grad_norm for update in reports), default=0.0) if takes_norm else None,
            # In bf16 the engines do not see changes that are still too small for it; the main weights have them.
            weights_changed=self.weights_changed or self.actor.dtype != torch.float32,
        )
        for warning in self.lead.watch.see(record):
            self.lead.journal.warn(warning)

    def save_or_end(self, index: int) -> None:
        """Between two rollouts: write the checkpoint that is due, and end a run that has long learned nothing.

        Weights that earlier rollouts of such a run changed are saved first. Collective.

        Raises:
            RunEnded: on every rank; rank 0 says why.
        """
        reason, choice = None, _GO_ON
        if self.lead:
            reason = self.lead.watch.must_stop
            if reason is not None:
                choice = _SAVE_AND_END if self.lead.watch.has_moved else _END
            elif self.lead.checkpoints.is_due(index):
                choice = _SAVE
        choice = self._agree(choice)
        if choice == _SAVE:
            fault = self.save(f"hf-{index}")
            if self.lead and fault is not None:
                self.lead.checkpoints.warn_once(fault)
        if choice == _SAVE_AND_END:
            self.save_at_last(f"hf-{index}")
        if choice in (_END, _SAVE_AND_END):
            if self.lead:
                self.lead.journal.finish()
            raise self._ended(reason)

    def end_as_failed_if_useless(self) -> None:
        """After the last rollout: a run that learned nothing is not to pass for a success. Collective.

        Raises:
            RunEnded: on every rank; rank 0 says why.
        """
        verdict = self.lead.watch.at_end() if self.lead else None
        if self.lead and verdict is not None and not verdict.has_failed:
            self.lead.journal.warn(verdict.sentence)
        if self._agree(_END if verdict is not None and verdict.has_failed else _GO_ON) == _END:
            raise self._ended(verdict.sentence if verdict else None)

    def _ended(self, reason: str | None) -> RunEnded:
        if not self.lead or reason is None:
            return RunEnded()
        left = what_is_left(self.lead.journal.folder, has_moved=self.lead.watch.has_moved)
        return RunEnded(f"{reason}; {left} (--on-nothing-learned warn: go on all the same)", says_where=True)

    def _agree(self, choice: int) -> int:
        """Rank 0's choice, on every rank. Collective."""
        if not self.lead:
            return self._told()
        self._tell(choice)
        return choice


def _num_continued(collected: Collected) -> int:
    """Answers that several versions of the weights sampled, each a part."""
    return sum(len(rollout.completion.parts) > 1 for group in collected.groups for rollout in group.rollouts)


def _num_empty(collected: Collected) -> int:
    """Answers without text, but for white space."""
    return sum(not rollout.response.strip() for group in collected.groups for rollout in group.rollouts)


def update_row(update: UpdateReport) -> dict[str, float]:
    """What one of a rollout's several updates did."""
    metrics = {name: mean.value for name, mean in update.metrics.items()}
    return {**metrics, "grad_norm": update.grad_norm, "lr": update.lr}


def refuse_useless(index: int, collected: Collected) -> None:
    """A rollout of which nothing can be learned is a broken set-up, not a bad score.

    Raises:
        RunEnded: every prompt failed, or the judge did: on more than half of the answers, or on all where that is 0.
    """
    if not collected.groups:
        raise RunEnded(f"rollout {index}: all of its prompts failed, the first with {collected.counts.why_failed}")
    rollouts = [rollout for group in collected.groups for rollout in group.rollouts]
    errors = [rollout.judge_error for rollout in rollouts if rollout.judge_error]
    num_unjudged = sum(rollout.reward is None for rollout in rollouts)
    if len(errors) == len(rollouts) or 2 * num_unjudged > len(rollouts):
        raise RunEnded(
            f"rollout {index}: the judge failed on {len(errors):,} of {len(rollouts):,} answers, first with {errors[0]}"
        )


def peak_memory(groups: ParallelGroups) -> dict[str, float]:
    """Highest resident memory of all ranks and rollout workers, and of the fullest GPU, in GB. Collective."""
    resident = torch.tensor([peak_rss_bytes()], dtype=torch.float64)
    on_cuda = torch.tensor([cuda_peak_bytes()], dtype=torch.float64)
    dist.all_reduce(resident, op=dist.ReduceOp.SUM, group=groups.control)
    dist.all_reduce(on_cuda, op=dist.ReduceOp.MAX, group=groups.control)
    memory = {"memory_gb": resident.item() / 1e9}
    return {**memory, "cuda_memory_gb": on_cuda.item() / 1e9} if on_cuda.item() else memory
