"""The end of a run that is asked to stop: at the next boundary between two steps, with a saved state."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NoReturn, Protocol

from xrl.launch.exit import RunStopped
from xrl.launch.stop import StopRequest
from xrl.metrics.ending import how_far
from xrl.metrics.journal import Journal
from xrl.parallel.control import Control
from xrl.trainer import Trainer


class Saves(Protocol):
    """Who writes everything that a run needs to go on."""

    def save_now(self, trainer: Trainer, step: int) -> Path | None:
        """Save the state after `step`, and wait until all of it is on the disk. Collective.

        Returns:
            Where it is, on rank 0.

        Raises:
            RunEnded: it could not be saved, on every rank; rank 0 says why.
        """
        ...


class Stopping:
    """Ends the run where it is asked to, on any rank; the last of the hooks."""

    def __init__(
        self, stop: StopRequest, journal: Journal | None, control: Control, saves: Saves | None = None
    ) -> None:
        """
        Args:
            stop: this rank's; rank 0's knows of the file and of the time, too.
            journal: on rank 0, None on the others.
            saves: default: nothing is saved.
        """
        self._stop, self._journal, self._control, self._saves = stop, journal, control, saves

    def __call__(self, trainer: Trainer, step: int) -> None:
        """End the run here, where it is asked to. After the last step there is nothing to stop. Collective.

        Raises:
            RunStopped: on every rank; rank 0 says why.
        """
        self._stop.begin()
        if step and trainer.taken_at is not None:
            self._stop.updated(time.perf_counter() - trainer.taken_at)
        if step < trainer.num_steps and self._control.any(self._stop.asked() is not None):
            self.end(trainer, step)

    def end(self, trainer: Trainer, step: int) -> NoReturn:
        """Save what is there after `step`, and end the run. Collective.

        Raises:
            RunStopped: on every rank; rank 0 says why.
        """
        place = None
        if step and self._saves is not None:
            trainer.progress.enter(f"saving the state after rollout {step}")
            place = self._saves.save_now(trainer, step)
        sentence = ""
        if self._journal is not None:
            cause = self._stop.asked() or "a signal to another rank"
            sentence = f"stopped by {cause} {how_far(step, trainer.num_steps)}; {self._what_is_left(step, place)}"
            self._journal.finish()
        self._control.meet()  # the first rank to end lets the others be ended
        raise RunStopped(sentence, loses_nothing=not step or place is not None)

    def _what_is_left(self, step: int, place: Path | None) -> str:
        assert self._journal is not None
        if place is not None:
            return f"state saved in {place}"
        folder = f"run folder {self._journal.folder.path}"
        return f"{folder}; the state was not saved" if step else folder
