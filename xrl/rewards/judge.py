"""What a judge is, what it says, and the pool that asks it."""

from __future__ import annotations

import dataclasses
import logging
import math
import numbers
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from typing import SupportsFloat

from xrl.files.blame import location_of, location_raised, shown, words_of
from xrl.launch.terminal import one_line
from xrl.types import Prompt, Verdict

logger = logging.getLogger(__name__)

# Response text and its prompt in, reward out; None where the judge cannot say.
Judge = Callable[[str, Prompt], float | None]
# Raises ValueError for a prompt whose ground truth the judge could compare no answer with.
TruthCheck = Callable[[Prompt], None]

# What a judge's process is asked about.
ANSWERS, TRUTHS = "answers", "truths"
# Larger ones are a mistake, and their squares add up to infinity.
MAX_REWARD = 1e6
# Keep one odd answer, and one odd judge, from filling the log.
MAX_FAILURE_CHARS = 80
MAX_DETAIL_CHARS = 300
MAX_KINDS = 32
# In place of further kinds of failure.
OTHER_KIND = "other failures"


def failed_verdict(failure: str, detail: str, location: str = "") -> Verdict:
    """No reward, and why."""
    return Verdict(
        reward=None,
        failure=clean(failure, MAX_FAILURE_CHARS) or "failed",
        detail=clean(detail, MAX_DETAIL_CHARS),
        location=clean(location, MAX_DETAIL_CHARS),
    )


def clean(text: str, max_chars: int) -> str:
    """The beginning of a text of a judge's, for a log, a terminal or a file: on one line, and without commands."""
    # Half a character could not be written anywhere.
    return one_line(text[:max_chars]).encode("utf-8", "backslashreplace").decode()


def ask(judge: Judge, response: str, prompt: Prompt, *, catches: type[BaseException] = Exception) -> Verdict:
    """Ask a judge here and now; what it raises, or its reward when it is looked at, becomes a failed verdict.

    Args:
        catches: BaseException in a process of its own, where Ctrl-C and the like can only be the judge's.
    """
    try:
        reward = judge(response, prompt)
        number = None if reward is None else _as_reward(reward)
    except (catches, SystemExit) as error:  # a judge may be anyone's code: one bad answer must not end the run
        return failed_verdict(type(error).__name__, words_of(error), location_raised(error))
    if reward is None:
        return failed_verdict("None", "the judge could not say", location_of(judge))
    if number is None:
        return failed_verdict(
            "bad reward",
            f"a judge must return a number from -{MAX_REWARD:,.0f} to {MAX_REWARD:,.0f}, got {shown(reward)}",
            location_of(judge),
        )
    return Verdict(reward=number)


def _as_reward(reward: object) -> float | None:
    """A number within MAX_REWARD. NumPy's and torch's scalars are welcome; text that looks like one is a mistake."""
    is_complex = isinstance(reward, numbers.Complex) and not isinstance(reward, numbers.Real)
    if is_complex or isinstance(reward, str | bytes):  # NumPy's have a __float__
        return None
    try:
        number = float(reward) if isinstance(reward, SupportsFloat) else math.nan
    except (TypeError, ValueError, OverflowError, RuntimeError):  # an array of several, an integer beyond all floats
        return None
    return number if abs(number) <= MAX_REWARD else None  # so is NaN none


class JudgePool(ABC):
    """Judges answers, possibly many at once, and counts what failed."""

    def __init__(self, *, failed_reward: float | None = None, speaks: bool = True) -> None:
        """
        Args:
            failed_reward: of an answer whose judge failed; None leaves it without a reward.
            speaks: log the first failure of each kind.
        """
        self.failed_reward = failed_reward
        self.speaks = speaks
        self.num_judged = 0
        self.failures: Counter[str] = Counter()  # by kind
        self._lock = threading.Lock()

    @abstractmethod
    def submit(self, response: str, prompt: Prompt) -> Future[Verdict]:
        """Have one answer judged. The future never raises, unless the pool is closed before its turn."""

    @abstractmethod
    def close(self) -> None:
        """End every judge at once; answers not judged yet are cancelled. May be called twice."""

    @property
    def num_failed(self) -> int:
        """Answers whose judge raised, ran out of time, died or gave no reward."""
        return self.failures.total()

    def _settle(self, verdict: Verdict) -> Verdict:
        """Count a verdict, speak of the first failure of a kind, and give it the reward of a failed judge."""
        with self._lock:
            self.num_judged += 1
            if not verdict.failed:
                return verdict
            kind = verdict.failure
            if kind not in self.failures and len(self.failures) >= MAX_KINDS:
                kind = OTHER_KIND
            self.failures[kind] += 1
            is_new = self.failures[kind] == 1
        if is_new and self.speaks:
            so = "is left out" if self.failed_reward is None else f"gets reward {self.failed_reward:g}"
            logger.warning(
                "the judge failed, the answer %s (said once a kind, then only counted): %s", so, verdict.error
            )
        return dataclasses.replace(verdict, reward=self.failed_reward)


class InlineJudge(JudgePool):
    """A judge that always ends soon, asked in the caller's thread."""

    def __init__(self, judge: Judge, *, failed_reward: float | None = None) -> None:
        super().__init__(failed_reward=failed_reward)
        self.judge = judge

    def submit(self, response: str, prompt: Prompt) -> Future[Verdict]:
        future: Future[Verdict] = Future()
        future.set_result(self._settle(ask(self.judge, response, prompt)))
        return future

    def close(self) -> None:
        """Do nothing: nothing runs between calls."""
