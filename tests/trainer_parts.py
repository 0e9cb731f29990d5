"""A run whose parts only write down what they were asked: what tests of the trainer put in the place of the rest.

Each part adds a line to the run's log; what it answers is a field that a test may set.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed import ProcessGroup

from tests.metrics.learning_records import WORDS
from tests.ranks import groups, layout
from tests.samples import group, prompt, sample
from xrl.actor.actor import UpdateReport
from xrl.algorithms.grpo import GRPO
from xrl.config import (
    AlgorithmConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    Settings,
)
from xrl.files.disk import NotWritten
from xrl.launch.progress import Progress
from xrl.metrics.learning import LearningWatch
from xrl.metrics.mean import Mean
from xrl.metrics.run_folder import RunFolder
from xrl.rollout.collect import Collected
from xrl.rollout.pool import RolloutCounts
from xrl.rollout.process import WorkerGone
from xrl.rollout.publish import NoneUpdated, PublishReport
from xrl.trainer import Lead, Trainer
from xrl.types import Group, Prompt, Sample, SamplingParams

BUCKETS = ("embeddings", "layers.0", "final")
SAMPLING = SamplingParams(temperature=0.7, max_new_tokens=8, stop_token_ids=(2,), seed=1000)
# What a run is told beside the defaults. Weights go by `weights`, whether or not the compiled kernels are there.
DEFAULTS: dict[str, dict[str, Any]] = {
    "data": {"rollout_batch_size": 2, "samples_per_prompt": 2},
    "rollout": {"weight_transport": "broadcast", "canary_tokens": 0},
}


def settings(**sections: dict[str, Any]) -> Settings:
    """Settings of a run; sections are by their names, `rollout={"colocate": True}` say."""
    fields = {name: {**DEFAULTS.get(name, {}), **sections.get(name, {})} for name in (*DEFAULTS, *sections)}
    kinds = {"algorithm": AlgorithmConfig, "evaluation": EvaluationConfig, "optimizer": OptimizerConfig}
    return Settings(
        model=ModelConfig(model=Path("unused")),
        data=DataConfig(data=Path("unused"), **fields.pop("data")),
        rollout=RolloutConfig(**fields.pop("rollout")),
        **{name: kinds[name](**values) for name, values in fields.items()},  # type: ignore[arg-type]
    )


def report(
    *, loss: float = 0.25, mismatch: float = 0.125, count: float = 1.0, grad_norm: float = 0.5, lr: float = 1e-6
) -> UpdateReport:
    """What an update did; each metric is of so many tokens."""
    metrics = {"loss": loss, "mismatch": mismatch, "mismatch_kl": mismatch / 2}
    return UpdateReport(
        metrics={name: Mean(value * count, count) for name, value in metrics.items()},
        grad_norm=grad_norm,
        lr=lr,
        num_tokens=40,
        computed_tokens=30,
    )


def published(version: int) -> list[str]:
    """What the log says of an update of the engines."""
    return [f"weights {version} are out", f"publish {version}"]


def saved(name: str, *, num_rollouts: int) -> list[str]:
    """What it says of a checkpoint; its weights carry the number of the last rollout."""
    return [f"weights {num_rollouts} are out", f"save {name}"]


def not_written() -> NotWritten:
    return NotWritten(Path("hf-1"), OSError(errno.ENOSPC, "No space left on device"), num_bytes=10)


def flat(_: int) -> list[Group]:
    """Nothing can be learned from answers that all got the same reward."""
    return [group(1.0, 1.0), group(1.0, 1.0)]


class Actor:
    """One rank's share of a policy."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.reports: Callable[[int], list[UpdateReport]] = lambda number: [report()]  # of the n-th rollout, from 1
        self.updates: list[tuple[list[Sample], Any]] = []  # samples and the algorithm of each
        self.differences: list[float] = [0.5]
        self.scored: list[list[Sample]] = []
        self.memories: list[Any] = []  # that shared weights were to be written to
        self.seconds = {"logprobs": 0.5, "update": 1.5}
        self.dtype = torch.float32
        self.memory = SimpleNamespace(
            offload=lambda: log.append("actor leaves the device"), restore=lambda: log.append("actor takes the device")
        )

    def learn(self, samples: Sequence[Sample] | None, algorithm: Any) -> list[UpdateReport]:
        self.log.append("learn" if samples is None else f"learn from {len(samples)}")
        self.updates.append((list(samples or ()), algorithm))
        return self.reports(len(self.updates)) if samples or samples is None else []

    def weights(self, *, version: int) -> Iterator[str]:
        yield from BUCKETS
        self.log.append(f"weights {version} are out")

    def shared_weights(self, memory: Any, *, version: int) -> Iterator[str]:
        self.memories.append(memory)
        yield from BUCKETS
        self.log.append(f"shared weights {version} are out")

    def mismatch(self, samples: Sequence[Sample] | None) -> list[float]:
        self.scored.append(list(samples or ()))
        self.log.append("score canaries" if samples is None else f"score {len(samples)} canaries")
        return self.differences[: len(samples or ())]


class Pool:
    """Rollout workers."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.num_ready: Callable[[], int] = lambda: 1
        self.num_lost, self.num_restarted = 0, 0
        self.recover: Callable[[], None] | None = None

    def ready(self) -> list[int]:
        return list(range(self.num_ready()))

    def none_left(self) -> WorkerGone:
        return WorkerGone("no rollout worker is left")

    def sleep(self) -> None:
        self.log.append("engines sleep")

    def wake(self) -> None:
        self.log.append("engines wake")


class Collector:
    """Answers to prompts."""

    def __init__(self, log: list[str]) -> None:
        self.log, self.pool = log, Pool(log)
        self.calls: list[tuple[list[Prompt], dict[str, Any]]] = []
        self.num_carried = 0
        self.groups: Callable[[int], list[Group]] = lambda number: [group(1.0, 0.0), group(0.0, 1.0)]
        self.counts = RolloutCounts(sent=2, finished=2)
        self.meanwhile: Callable[[], None] = lambda: None

    def collect(self, prompts: Sequence[Prompt], **call: Any) -> Collected:
        self.calls.append((list(prompts), call))
        self.log.append(f"take {len(self.calls)}")
        self.meanwhile()
        return Collected(groups=self.groups(len(self.calls)), counts=self.counts, seconds=4.0, num_tokens=8)


class Publisher:
    """Weights to the workers."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.memory = object()
        self.checksums: Callable[[int], tuple[str, ...]] = lambda version: (f"checksum {version}",)
        self.is_lost: Callable[[int], bool] = lambda number: False  # whether the n-th publication, from 1, reaches none
        self.num_calls = 0

    def publish(self, buckets: Iterable[Any], *, version: int) -> PublishReport:
        self.num_calls += 1
        if self.is_lost(self.num_calls):
            next(iter(buckets))  # it was lost over the first one
            self.log.append(f"publish {version}: lost")
            raise NoneUpdated(f"weights version {version}: no rollout worker has it")
        assert tuple(buckets) == BUCKETS
        self.log.append(f"publish {version}")
        return PublishReport(
            seconds=1.0,
            num_bytes=3_000_000_000,
            num_tensors=9,
            num_workers=2,
            num_layers=3,
            num_resent=1,
            checksums=self.checksums(version),
        )


class Canary:
    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.samples = [sample([1], [3])]
        self.judged: list[list[float]] = []

    def sample(self) -> list[Sample]:
        self.log.append("ask the canary")
        return self.samples

    def judge(self, differences: Sequence[float]) -> float:
        self.log.append("judge the canary")
        self.judged.append(list(differences))
        return max(differences)


class Journal:
    """What the user is told."""

    def __init__(self, log: list[str], folder: Path) -> None:
        self.log = log
        self.folder = RunFolder(folder)
        self.said: list[str] = []
        self.warned: list[str] = []
        self.rollouts: list[tuple[Any, ...]] = []
        self.rows: dict[int, dict[str, float]] = {}
        self.updates: dict[int, list[dict[str, float]]] = {}
        self.first_updates: list[dict[str, float]] = []
        self.evaluations: dict[int, dict[str, float]] = {}

    def say(self, line: str) -> None:
        self.said.append(line)

    def warn(self, line: str) -> None:
        self.warned.append(line)

    def rollout(self, *rollout: Any) -> None:
        self.log.append(f"write answers {rollout[0]}")
        self.rollouts.append(rollout)

    def step(self, index: int, metrics: dict[str, float], updates: Sequence[dict[str, float]] = ()) -> None:
        self.log.append(f"report {index}")
        self.rows[index] = dict(metrics)
        self.updates[index] = list(updates)

    def first_update(self, metrics: dict[str, float]) -> None:
        self.first_updates.append(dict(metrics))

    def evaluation(self, index: int, metrics: dict[str, float]) -> None:
        self.evaluations[index] = dict(metrics)

    def finish(self) -> None:
        self.log.append("finish")


class Checkpoints:
    """Folders with weights."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.due: set[int] = set()
        self.faults: list[NotWritten | None] = []  # of the next writes; none where it is empty
        self.waits: list[bool] = []  # whether another try may help, of the next questions
        self.warnings: list[NotWritten] = []

    def is_due(self, index: int) -> bool:
        return index in self.due

    def write(self, name: str, buckets: Iterable[Any]) -> NotWritten | None:
        assert tuple(buckets) == BUCKETS
        self.log.append(f"save {name}")
        return self.faults.pop(0) if self.faults else None

    def warn_once(self, fault: NotWritten) -> None:
        self.warnings.append(fault)

    def wait_for_room(self, fault: NotWritten) -> bool:
        self.log.append("wait for room")
        return self.waits.pop(0)

    def words_about_loss(self, fault: NotWritten) -> str:
        return f"{fault}; there is no checkpoint"


class Run:
    """A run of one rank, or the lead's side of one of several: its parts, and the log that they write."""

    def __init__(
        self,
        folder: Path,
        *,
        control: ProcessGroup,
        rank: int = 0,
        num_ranks: int = 1,
        stops: bool = True,
        **sections: dict[str, Any],
    ) -> None:
        """
        Args:
            folder: of the run; only its name is used.
            control: the group of all ranks.
            stops: whether a run that learns nothing ends.
            sections: as `settings` takes them.
        """
        self.log: list[str] = []
        self.settings = settings(**sections)
        self.groups = groups(layout(data=num_ranks), rank=rank, control=control)
        self.actor = Actor(self.log)
        self.algorithm = GRPO(self.settings.algorithm)
        self.progress = Progress()
        self.collector = Collector(self.log)
        self.pool = self.collector.pool
        self.prompts = SimpleNamespace(epoch=2, next_batch=lambda count: [prompt(5, id=n) for n in range(count)])
        self.publisher = Publisher(self.log)
        self.canary = Canary(self.log)
        self.judge_mismatch: Callable[[float], None] = lambda value: None
        self.rates: dict[str, float] | None = None  # None: the run has no evaluator
        self.journal = Journal(self.log, folder)
        self.checkpoints = Checkpoints(self.log)
        self.learning = LearningWatch(WORDS, stops=stops)

    def trainer(self, num_rollouts: int = 1, *, leads: bool = True) -> Trainer:
        return Trainer(
            self.settings,
            self.groups,
            self.actor,  # type: ignore[arg-type]
            self.algorithm,
            self._lead() if leads else None,
            num_rollouts=num_rollouts,
            progress=self.progress,
        )

    def train(self, num_rollouts: int = 1) -> Trainer:
        trainer = self.trainer(num_rollouts)
        trainer.train()
        return trainer

    def _lead(self) -> Lead:
        parts: dict[str, Any] = {
            "prompts": self.prompts,
            "sampling": SAMPLING,
            "collector": self.collector,
            "publisher": self.publisher,
            "canary": self.canary if self.settings.rollout.canary_tokens else None,
            "mismatch": SimpleNamespace(judge=self._judge_mismatch),
            "evaluator": None if self.rates is None else SimpleNamespace(evaluate=self._evaluate),
            "journal": self.journal,
            "checkpoints": self.checkpoints,
            "watch": self.learning,
        }
        return Lead(**parts)

    def _judge_mismatch(self, value: float, *, rollout: int) -> None:
        self.log.append(f"judge mismatch {value} of {rollout}")
        self.judge_mismatch(value)

    def _evaluate(self) -> dict[str, float] | None:
        self.log.append("evaluate")
        return self.rates
