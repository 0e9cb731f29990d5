"""A run goes on where its logs cannot be written: a full disk, a folder that is gone, a disk that is read-only now."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from xrl.files.disk import NotWritten
from xrl.metrics.console import LOGGER_NAME

logger = logging.getLogger(LOGGER_NAME)


class LogGaps:
    """Says once that logs cannot be written, and once that they are written again and what is missing."""

    def __init__(self) -> None:
        self._failing: set[str] = set()  # logs whose last write failed
        self._said: set[str | None] = set()  # what the system said of them
        self._missing: list[int] = []  # rollouts whose answers were not written

    def try_to(self, write: Callable[[], None], log: str, path: Path, *, rollout: int | None = None) -> bool:
        """Write into one of the run's logs; returns whether it is written.

        Args:
            log: which one; it has failed until a write into the same log succeeds.
            path: its file.
            rollout: whose answers are missing if it fails.
        """
        try:
            write()
        except OSError as error:
            self._fail(log, error if isinstance(error, NotWritten) else NotWritten(path, error, num_bytes=0))
            if rollout is not None:
                self._missing.append(rollout)
            return False
        self._failing.discard(log)
        if self._said and not self._failing:
            logger.warning("%s", "; ".join(filter(None, ("logs are written again", self._words_about_missing()))))
            self._said.clear()
            self._missing.clear()
        return True

    def end(self) -> None:
        """At the end of a run: say which logs go without their last records, if any do."""
        if self._failing:
            incomplete = f"{', '.join(sorted(self._failing))} could not be written to the end"
            logger.warning("%s", "; ".join(filter(None, (incomplete, self._words_about_missing()))))

    def _fail(self, log: str, fault: NotWritten) -> None:
        self._failing.add(log)
        if fault.strerror not in self._said:
            self._said.add(fault.strerror)
            logger.warning("%s; the run goes on, and its logs as soon as they can be written", fault)

    def _words_about_missing(self) -> str:
        if not self._missing:
            return ""
        first, last, count = self._missing[0], self._missing[-1], len(self._missing)
        which = f"rollout {first}" if count == 1 else f"{count:,} rollouts between {first} and {last}"
        return f"the answers of {which} are missing"
