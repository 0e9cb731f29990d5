"""Ground truths that no answer could be compared with, refused before anything starts, with file and line."""

from __future__ import annotations

import logging
import time
from collections import deque
from concurrent.futures import Future

from xrl.config import SettingsError
from xrl.files.blame import words_of
from xrl.rewards.judge import TruthCheck
from xrl.rewards.messages import encode_prompt
from xrl.rewards.number import read_number
from xrl.rewards.process import JudgeSetup
from xrl.rewards.processes import ProcessJudges
from xrl.rewards.values import NotCarried
from xrl.types import Prompt, Verdict

logger = logging.getLogger("xrl")

# A parser of formulas may be slow on each of a hundred thousand rows: what is not asked by then is met in the run.
LIMIT_S = 30.0
# Bounds what is held of the file, and how late a wrong row is noticed.
MAX_WAITING = 256


class TruthChecker:
    """Asks a judge about one row after the other; this one asks nothing. Use as a context manager."""

    def see(self, where: str, prompt: Prompt) -> None:
        """Ask about the next row.

        Args:
            where: "train.jsonl, line 3".
            prompt: without tokens, which nobody has made yet.

        Raises:
            SettingsError: the judge cannot use the ground truth of this row or, where it is asked in processes, of an
                earlier one.
        """

    def finish(self) -> None:
        """Wait for the answers about all rows.

        Raises:
            SettingsError: as `see` does.
        """

    def close(self) -> None:
        """Stop asking at once."""

    def __enter__(self) -> TruthChecker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.close()


class InlineTruthChecker(TruthChecker):
    """Asks the judge in this process."""

    def __init__(self, check: TruthCheck) -> None:
        self.check = check

    def see(self, where: str, prompt: Prompt) -> None:
        try:
            self.check(prompt)
        except ValueError as error:
            raise SettingsError(f"{where}: {words_of(error)}") from error


class ProcessTruthChecker(TruthChecker):
    """Asks in processes that are bounded from outside, as a judge's code and its parsers may hang or crash."""

    def __init__(self, setup: JudgeSetup, *, timeout_s: float, num_workers: int, reads_numbers: bool) -> None:
        """
        Args:
            setup: of a judge that is asked about TRUTHS.
            reads_numbers: the judge takes any plain number, so it is not asked about them.
        """
        self.reads_numbers = reads_numbers
        self.checks_truths = True
        self.pool = ProcessJudges(setup, timeout_s=timeout_s, num_workers=num_workers, speaks=False)
        self.waiting: deque[tuple[str, Prompt, Future[Verdict]]] = deque()
        self.asked_since: float | None = None
        self.num_not_asked = 0

    def start(self) -> None:
        """See whether the judge can be imported at all, and whether it has anything to say about ground truths.

        Raises:
            SettingsError: it cannot be imported.
        """
        try:
            self.checks_truths = self.pool.start_one()
        except BaseException:
            self.close()
            raise
        if not self.checks_truths:
            self.close()

    def see(self, where: str, prompt: Prompt) -> None:
        if prompt.extra:
            _check_carried(where, prompt)
        if not self.checks_truths or (self.reads_numbers and read_number(prompt.ground_truth) is not None):
            return
        self.asked_since = self.asked_since or time.monotonic()
        if time.monotonic() - self.asked_since > LIMIT_S:
            self.num_not_asked += 1
            return
        self.waiting.append((where, prompt, self.pool.submit("", prompt)))
        while self.waiting and (len(self.waiting) > MAX_WAITING or self.waiting[0][2].done()):
            self._hear()

    def finish(self) -> None:
        while self.waiting:
            self._hear()
        if self.num_not_asked:
            logger.warning(
                "the judge was asked about ground truths for %g s; those of %d more rows are first read when answers "
                "to them are judged",
                LIMIT_S,
                self.num_not_asked,
            )

    def close(self) -> None:
        self.pool.close()

    def _hear(self) -> None:
        where, prompt, future = self.waiting.popleft()
        # Unbounded: the pool gives each answer --judge-timeout-s, and its processes a limit for their start.
        verdict = future.result()
        if verdict.failure == "judge did not start":
            raise SettingsError(verdict.detail)
        if verdict.failure == "ValueError":
            reason = verdict.detail or f"the judge refuses the ground truth {prompt.ground_truth!r}"
            raise SettingsError(f"{where}: {reason}")
        if verdict.failed:
            raise SettingsError(
                f"{where}: the judge could not check the ground truth {prompt.ground_truth!r}: {verdict.error}"
            )


def _check_carried(where: str, prompt: Prompt) -> None:
    """Refuse what could not be sent to a judge's process when its time has come."""
    try:
        encode_prompt(prompt)
    except NotCarried as error:
        raise SettingsError(
            f"{where} has an `extra_info` with {error}, which cannot be handed to a judge: make it text or leave it out"
        ) from error
