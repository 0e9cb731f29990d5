"""Between steps: the state that is due is saved, and what was begun before is settled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from xrl.checkpoint.writer import LeadPart, Saved, StateWriter
from xrl.collaborators import Takes
from xrl.experience.asking import Need
from xrl.experience.experience import Batch
from xrl.files.disk import NotWritten
from xrl.launch.exit import RunEnded
from xrl.launch.progress import Progress
from xrl.metrics.journal import Journal
from xrl.parallel.control import Control
from xrl.trainer import Trainer


class Pieces(Protocol):
    """What of this rank's is saved."""

    def pieces(self) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True, kw_only=True)
class StateKeeper:
    """What rank 0 has for it."""

    journal: Journal
    lead_part: Callable[[int], LeadPart]  # of a step


class SettlingExperience:
    """Settles, once a rollout is there, the state that was being written meanwhile."""

    def __init__(self, inner: Takes, saving: StateSaving) -> None:
        self._inner, self._saving = inner, saving

    def take(self, step: int) -> Batch | Need:
        """As the inner one's. Collective."""
        found = self._inner.take(step)
        self._saving.settle()
        return found


class StateSaving:
    """Saves the run's state every so many steps, and whenever it is asked to. Its methods are collective."""

    def __init__(
        self,
        model: Pieces,
        writer: StateWriter,
        keeper: StateKeeper | None,
        control: Control,
        progress: Progress,
        *,
        interval: int | None,
        saved: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        """
        Args:
            keeper: on rank 0, None on the others.
            interval: in steps; None: only when asked to.
            saved: is told on rank 0 how long each save took, in seconds.
        """
        self._model, self._writer, self._keeper = model, writer, keeper
        self._control, self._progress, self._interval = control, progress, interval
        self._saved = saved
        self._said: str | None = None  # why the last save failed, once the user knows
        self._saved_step: int | None = None  # of the newest state that is whole, on rank 0

    def __call__(self, trainer: Trainer, step: int) -> None:
        """Settle what was begun, and begin what is due."""
        if not self._interval or step == 0:
            return
        is_last = step == trainer.num_steps
        is_due = is_last or step % self._interval == 0
        if self._writer.is_writing:
            self._progress.enter(f"saving the state of step {step}", "save")
            self._tell(self._writer.settle(wait=is_due))
        if is_due:
            self._progress.enter(f"saving the state of step {step}", "save")
            self._tell(self._begin(step, is_last=is_last))
            if is_last:
                self._tell(self._writer.settle(wait=True))

    def settle(self) -> None:
        """Give a state its name whose files are there by now; waits for none. Collective."""
        if self._writer.is_writing:
            self._tell(self._writer.settle())

    def save_now(self, step: int) -> None:
        """Save the state of this step before anything else happens.

        Raises:
            RunEnded: it cannot be saved; on every rank, and rank 0 says why.
        """
        self._progress.enter(f"saving the state of step {step}", "save")
        self._tell(self._writer.settle(wait=True))
        if self._control.agree(self._saved_step == step):
            return
        fault = self._begin(step)
        result = self._writer.settle(wait=True)
        fault = result if isinstance(result, NotWritten) else fault
        if isinstance(result, Saved):
            self._tell(result)
        if self._control.agree(fault is not None):
            raise RunEnded(f"the run's state cannot be saved: {fault}" if fault else "")

    def _begin(self, step: int, *, is_last: bool = False) -> NotWritten | None:
        lead = self._keeper.lead_part(step) if self._keeper else None
        return self._writer.begin(step, self._model.pieces(), lead, is_last=is_last)

    def _tell(self, result: Saved | NotWritten | None) -> None:
        if self._keeper is None or result is None:
            return
        if isinstance(result, Saved):
            self._said, self._saved_step = None, result.step
            self._saved(result.seconds)
            self._keeper.journal.say(
                f"saved {result.folder}: {result.num_bytes / 1e6:,.1f} MB in {result.seconds:.2f} s, of which the run "
                f"waited {result.seconds_held_up:.2f} s"
            )
        elif self._said != result.strerror:
            self._said = result.strerror
            self._keeper.journal.warn(f"{result}; the run goes on, and tries again with the next state that is due")
