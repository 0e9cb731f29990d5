"""The end of a run that is asked to stop: at the next boundary between two steps, with a saved state."""

from __future__ import annotations

import time
from typing import NoReturn, Protocol

from xrl.checkpoint.manifest import step_folder
from xrl.launch.exit import RunStopped
from xrl.launch.stop import StopRequest
from xrl.metrics.ending import how_far
from xrl.metrics.journal import Journal
from xrl.parallel.control import Control
from xrl.trainer import Trainer


class Saves(Protocol):
    """Who writes everything that a run needs to go on."""

    def save_now(self, step: int) -> None:
        """Save the state after `step`, if it is not saved yet, and wait until it is. Collective.

        Raises:
            RunEnded: it could not be saved, on every rank; rank 0 says why.
        """
        ...


class Stopping:
    """Ends the run where it is asked to, on any rank; the last of the hooks."""

    def __init__(
        self,
        stop: StopRequest,
        journal: Journal | None,
        control: Control,
        saves: Saves | None = None,
        *,
        first_step: int = 0,
    ) -> None:
        """
        Args:
            stop: this rank's; rank 0's knows of the file and of the time, too.
            journal: on rank 0, None on the others.
            saves: default: nothing is saved.
            first_step: rollouts that an earlier attempt has learned from, and whose state is saved.
        """
        self._stop, self._journal, self._control, self._saves = stop, journal, control, saves
        self._first_step = first_step

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
        has_learned = step > self._first_step
        saves = self._saves if has_learned else None
        if saves is not None:
            saves.save_now(step)
        sentence = ""
        if self._journal is not None:
            cause = self._stop.asked() or "a signal to another rank"
            folder = self._journal.folder
            left = f"run folder {folder.path}"
            if has_learned:
                left = (
                    f"state saved in {step_folder(folder.state, step)}" if saves else f"{left}; the state was not saved"
                )
            sentence = f"stopped by {cause} {how_far(step, trainer.num_steps)}; {left}"
            self._journal.finish()
        self._control.meet()  # the first rank that ends lets the launcher end the others
        raise RunStopped(sentence, loses_nothing=saves is not None or not has_learned)
