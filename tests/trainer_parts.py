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
from xrl.algorithms import Algorithm
from xrl.algorithms.grpo import GRPO
from xrl.config import AlgorithmConfig
from xrl.experience.asking import Asking, Need
from xrl.experience.collect import Collected
from xrl.experience.experience import Experience, SampledRollouts
from xrl.experience.turns import DeviceTurns, TurnTakingLearner, TurnTakingPublisher
from xrl.files.disk import NotWritten
from xrl.hooks import Checkpointing, Ending, Evaluation
from xrl.launch.progress import Progress
from xrl.launch.stop import StopRequest
from xrl.metrics.learning import LearningWatch
from xrl.metrics.mean import Mean
from xrl.metrics.run_folder import RunFolder
from xrl.parallel.control import Control
from xrl.reporter import Reporter
from xrl.rollout.dispatch import RolloutCounts
from xrl.rollout.process import WorkerGone
from xrl.rollout.publish import NoneUpdated, PublishReport
from xrl.rollout.publisher import CheckedPublisher, PersistentPublisher, Publisher, WeightPublisher
from xrl.stopping import Stopping
from xrl.trainer import Trainer
from xrl.types import Group, Prompt, Sample, SamplingParams, UpdateReport

BUCKETS = ("embeddings", "layers.0", "final")
SAMPLING = SamplingParams(temperature=0.7, max_new_tokens=8, stop_token_ids=(2,), seed=1000)


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
        self.updates: list[tuple[list[Sample], Algorithm]] = []
        self.differences: list[float] = [0.5]
        self.scored: list[list[Sample]] = []
        self.memories: list[Any] = []  # that were handed to the source of the weights
        self.seconds = {"logprobs": 0.5, "update": 1.5}
        self.dtype = torch.float32
        self.memory = SimpleNamespace(
            offload=lambda: log.append("actor leaves the device"), restore=lambda: log.append("actor takes the device")
        )

    def learn(self, samples: Sequence[Sample] | None, algorithm: Algorithm) -> list[UpdateReport]:
        self.log.append("learn" if samples is None else f"learn from {len(samples)}")
        self.updates.append((list(samples or ()), algorithm))
        return self.reports(len(self.updates)) if samples or samples is None else []

    def weights(self, *, version: int) -> Iterator[str]:
        yield from BUCKETS
        self.log.append(f"weights {version} are out")

    def stream(self, memory: Any, *, version: int) -> Iterator[str]:
        """In the place of the weights' source, too."""
        self.memories.append(memory)
        return self.weights(version=version)

    def mismatch(self, samples: Sequence[Sample] | None) -> list[float]:
        self.scored.append(list(samples or ()))
        self.log.append("score canaries" if samples is None else f"score {len(samples)} canaries")
        return self.differences[: len(samples or ())]


class Fleet:
    """Rollout workers."""

    def __init__(self, log: list[str]) -> None:
        self.log = log
        self.num_ready: Callable[[], int] = lambda: 1
        self.num_lost, self.num_restarted = 0, 0

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
        self.log, self.fleet = log, Fleet(log)
        self.calls: list[tuple[list[Prompt], dict[str, Any]]] = []
        self.num_carried = 0
        self.groups: Callable[[int], list[Group]] = lambda number: [group(1.0, 0.0), group(0.0, 1.0)]
        self.counts = RolloutCounts(sent=2, finished=2)
        self.num_lost: Callable[[int], int] = lambda number: 0  # times that no worker is ready, within the n-th

    def collect(self, prompts: Sequence[Prompt], **call: Any) -> Asking[Collected]:
        self.calls.append((list(prompts), call))
        self.log.append(f"take {len(self.calls)}")
        call["while_waiting"]()
        for _ in range(self.num_lost(len(self.calls))):
            yield Need.WEIGHTS
        return Collected(groups=self.groups(len(self.calls)), counts=self.counts, seconds=4.0, num_tokens=8)


class Stream:
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
            num_parts=3,
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


class Saves:
    """Who saves the state."""

    def __init__(self, log: list[str]) -> None:
        self.log = log

    def save_now(self, step: int) -> None:
        self.log.append(f"save the state after {step}")


class Run:
    """A run of one rank, or one rank's side of a run of several: its parts, and the log that they write."""

    def __init__(
        self,
        folder: Path,
        *,
        control: ProcessGroup,
        rank: int = 0,
        num_ranks: int = 1,
        stops: bool = True,
        colocate: bool = False,
        has_canary: bool = False,
        max_repeats: int = 3,
        eval_interval: int | None = None,
        num_in_flight: int = 2,
        enough: int | None = None,
        takes_norm: bool = True,
    ) -> None:
        """
        Args:
            folder: of the run; only its name is used.
            control: the group of all ranks.
            stops: whether a run that learns nothing ends.
            colocate: actor and engines take turns.
            max_repeats: of a publication that reached nobody.
            num_in_flight, enough: as in `SampledRollouts`.
            takes_norm: as in `Listeners`.
        """
        self.log: list[str] = []
        self.groups = groups(layout(data=num_ranks), rank=rank, control=control)
        self.colocate, self.has_canary, self.max_repeats = colocate, has_canary, max_repeats
        self.eval_interval, self.num_in_flight, self.enough = eval_interval, num_in_flight, enough
        self.takes_norm = takes_norm
        self.actor = Actor(self.log)
        self.algorithm = GRPO(AlgorithmConfig())
        self.progress = Progress()
        self.collector = Collector(self.log)
        self.fleet = self.collector.fleet
        self.prompts = SimpleNamespace(
            epoch=2,
            num_taken=7,
            next_batch=lambda count: [prompt(5, id=n) for n in range(count)],
            state_dict=lambda: {"position": 7},
            load_state_dict=lambda state: self.log.append(f"prompts from {state['position']}"),
        )
        self.stop = StopRequest()
        self.saves = Saves(self.log)
        self.stream = Stream(self.log)
        self.canary = Canary(self.log)
        self.judge_mismatch: Callable[[float], None] = lambda value: None
        self.rates: dict[str, float] | None = None  # None: the run has no evaluator
        self.journal = Journal(self.log, folder)
        self.checkpoints = Checkpoints(self.log)
        self.learning = LearningWatch(WORDS, stops=stops)

    def trainer(self, num_steps: int = 1, *, leads: bool = True, first_step: int = 0) -> Trainer:
        """What xrl.assembly puts together, of these parts."""
        control = Control.of(self.groups)
        actor: Any = self.actor
        turns = DeviceTurns(self.fleet if leads else None, self.actor.memory, control) if self.colocate else None
        keeper: Any = (
            SimpleNamespace(journal=self.journal, checkpoints=self.checkpoints, watch=self.learning) if leads else None
        )
        journal: Any = self.journal if leads else None
        stopping = Stopping(self.stop, journal, control, self.saves)
        return Trainer(
            Experience(self._source() if leads else None, control),
            actor if turns is None else TurnTakingLearner(actor, turns),
            self.algorithm,
            self._publisher(control, turns, leads=leads),
            Reporter(self._listeners() if leads else None, self.groups.control),
            num_steps=num_steps,
            first_step=first_step,
            hooks=[
                Checkpointing(actor, keeper, control, self.progress),
                Evaluation(
                    self if leads and self.rates is not None else None,
                    self.journal if leads else None,  # type: ignore[arg-type]
                    control,
                    interval=self.eval_interval,
                ),
                Ending(keeper, control),
                stopping,
            ],
            stopping=stopping,
            progress=self.progress,
        )

    def train(self, num_steps: int = 1, **options: Any) -> Trainer:
        trainer = self.trainer(num_steps, **options)
        trainer.train()
        return trainer

    def evaluate(self) -> Asking[dict[str, float]]:
        """In the place of the evaluator."""
        self.log.append("evaluate")
        return self.rates or {}
        yield Need.WEIGHTS

    def _source(self) -> SampledRollouts:
        return SampledRollouts(
            self.prompts,
            self.collector,
            self.algorithm.score,
            SAMPLING,
            num_samples=2,
            num_in_flight=self.num_in_flight,
            enough=self.enough,
            check_stop=self.stop.check,
        )

    def _publisher(self, control: Control, turns: DeviceTurns | None, *, leads: bool) -> Publisher:
        source: Any = self.actor
        stream: Any = self.stream if leads else None
        publisher: Publisher = WeightPublisher(source, stream, self.progress)
        if turns is not None:
            publisher = TurnTakingPublisher(publisher, turns)
        if self.has_canary:
            publisher = CheckedPublisher(publisher, self.actor, self.canary if leads else None)
        return PersistentPublisher(publisher, self.fleet if leads else None, control, max_repeats=self.max_repeats)

    def _listeners(self) -> Any:
        return SimpleNamespace(
            journal=self.journal,
            watch=self.learning,
            mismatch=SimpleNamespace(judge=self._judge_mismatch),
            records_samples=False,
            takes_norm=self.takes_norm,
            sees_every_change=self.actor.dtype == torch.float32,
        )

    def _judge_mismatch(self, value: float, *, rollout: int) -> None:
        self.log.append(f"judge mismatch {value} of {rollout}")
        self.judge_mismatch(value)
