"""What happens between steps: evaluation, checkpoints, and the end of a run that learns nothing."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from xrl.collaborators import Weights
from xrl.experience.asking import Asked, Asking, Need
from xrl.files.disk import NotWritten
from xrl.launch.exit import RunEnded
from xrl.launch.progress import Progress
from xrl.metrics.journal import Journal
from xrl.metrics.learning import LearningWatch
from xrl.metrics.learning_words import what_is_left
from xrl.parallel.control import Control
from xrl.trainer import Trainer
from xrl.weights.checkpoints import Checkpoints


class _Choice(enum.IntEnum):
    """What rank 0 decides between two steps."""

    GO_ON = 0
    SAVE = 1  # and go on
    END = 2
    SAVE_AND_END = 3  # earlier rollouts have changed the weights


class Evaluates(Protocol):
    """The evaluator."""

    def evaluate(self) -> Asking[dict[str, float]]: ...


class Evaluation:
    """Pass rates on held-out prompts: before and after training, and every so many steps."""

    def __init__(
        self, evaluator: Evaluates | None, journal: Journal | None, control: Control, *, interval: int | None = None
    ) -> None:
        """
        Args:
            evaluator: on rank 0, where there are held-out prompts; None on the others.
            journal: on rank 0, None on the others.
        """
        self._evaluator, self._journal, self._interval = evaluator, journal, interval
        self._asked: Asked[Mapping[str, float]] = Asked(control)

    def __call__(self, trainer: Trainer, step: int) -> None:
        """Evaluate, where it is time for it. Collective."""
        is_within = 0 < step < trainer.num_steps
        if is_within and not (self._interval and step % self._interval == 0):
            return
        trainer.progress.enter(f"evaluation after rollout {step}", "evaluation")
        rates = self.rates(lambda: trainer.publish(version=trainer.version))
        if self._journal and rates:
            self._journal.evaluation(step, rates)

    def rates(self, publish: Callable[[], object]) -> Mapping[str, float]:
        """Pass rates; on rank 0, empty on the others and without held-out prompts. Collective.

        Args:
            publish: gives the weights to the workers once more, where they need them.
        """
        while (found := self._asked.go_on(self._begin)) is Need.WEIGHTS:
            publish()
        return {} if isinstance(found, Need) else found

    def _begin(self) -> Asking[Mapping[str, float]]:
        if self._evaluator is None:
            return {}
        return (yield from self._evaluator.evaluate())


@dataclass(frozen=True, kw_only=True)
class Keeper:
    """What rank 0 has to keep weights, and to see whether there is anything worth keeping."""

    journal: Journal
    checkpoints: Checkpoints
    watch: LearningWatch


class Checkpointing:
    """Writes the checkpoint that is due, ends a run that has long learned nothing, and saves the last weights."""

    def __init__(self, model: Weights, keeper: Keeper | None, control: Control, progress: Progress) -> None:
        """
        Args:
            model: whose weights are saved.
            keeper: on rank 0, None on the others.
            progress: advances with every part of the weights.
        """
        self._model, self._keeper, self._control, self._progress = model, keeper, control, progress

    def __call__(self, trainer: Trainer, step: int) -> None:
        """Save or end, where it is time for it. Collective.

        Raises:
            RunEnded: on every rank; rank 0 says why.
        """
        if 0 < step < trainer.num_steps:
            self._save_or_end(step, trainer.num_steps)
        elif step == trainer.num_steps:
            self._save_at_last("hf-final", trainer.num_steps)

    def _save_or_end(self, step: int, num_steps: int) -> None:
        """Weights that earlier rollouts of a run that learns nothing changed are saved before its end."""
        reason, choice = None, _Choice.GO_ON
        if self._keeper:
            reason = self._keeper.watch.must_stop
            if reason is not None:
                choice = _Choice.SAVE_AND_END if self._keeper.watch.has_moved else _Choice.END
            elif self._keeper.checkpoints.is_due(step):
                choice = _Choice.SAVE
        choice = self._control.agree(choice)
        if choice == _Choice.SAVE:
            fault = self._save(f"hf-{step}", num_steps)
            if self._keeper and fault is not None:
                self._keeper.checkpoints.warn_once(fault)
        if choice == _Choice.SAVE_AND_END:
            self._save_at_last(f"hf-{step}", num_steps)
        if choice in (_Choice.END, _Choice.SAVE_AND_END):
            if self._keeper:
                self._keeper.journal.finish()
            raise ended(self._keeper, reason)

    def _save(self, name: str, version: int) -> NotWritten | None:
        """Write a Hugging Face folder below the run's; on rank 0, why it is not there if it is not."""
        self._progress.enter(f"saving {name}", "save")
        buckets = self._progress.through(self._model.weights(version=version))
        if not self._keeper:
            for _ in buckets:  # the other ranks get nothing but must take part
                pass
            return None
        fault = self._keeper.checkpoints.write(name, buckets)
        if fault is None:
            self._keeper.journal.say(f"saved {self._keeper.journal.folder.path / name}")
        return fault

    def _save_at_last(self, name: str, version: int) -> None:
        """Save weights that would be lost otherwise: tried again while there is hope for it.

        Raises:
            RunEnded: they could not be saved, on every rank; rank 0 says why.
        """
        choice = _Choice.SAVE
        while choice == _Choice.SAVE:
            choice = _Choice.GO_ON
            fault = self._save(name, version)
            if self._keeper and fault is not None:
                choice = _Choice.SAVE if self._keeper.checkpoints.wait_for_room(fault) else _Choice.END
            choice = self._control.agree(choice)
        if choice == _Choice.END:
            sentence = self._keeper.checkpoints.words_about_loss(fault) if self._keeper and fault else ""
            raise RunEnded(sentence, says_where=True)


class Ending:
    """After the last step: the reward curve, and no success for a run that learned nothing."""

    def __init__(self, keeper: Keeper | None, control: Control) -> None:
        """
        Args:
            keeper: on rank 0, None on the others.
        """
        self._keeper, self._control = keeper, control

    def __call__(self, trainer: Trainer, step: int) -> None:
        """End the run, after its last step. Collective.

        Raises:
            RunEnded: on every rank; rank 0 says why.
        """
        if step < trainer.num_steps:
            return
        verdict = None
        if self._keeper:
            self._keeper.journal.finish()
            verdict = self._keeper.watch.at_end()
            if verdict is not None and not verdict.has_failed:
                self._keeper.journal.warn(verdict.sentence)
        if self._control.agree(verdict is not None and verdict.has_failed):
            raise ended(self._keeper, verdict.sentence if verdict else None)


def ended(keeper: Keeper | None, reason: str | None) -> RunEnded:
    """The end of a run that learned nothing: rank 0 says why and what is left, the others say nothing."""
    if keeper is None or reason is None:
        return RunEnded()
    left = what_is_left(keeper.journal.folder, has_moved=keeper.watch.has_moved)
    return RunEnded(f"{reason}; {left} (--on-nothing-learned warn: go on all the same)", says_where=True)
