"""What a judge is, what it says, and the pool that asks it."""

from __future__ import annotations

import logging
import math
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import SupportsFloat

from xrl.types import Prompt

logger = logging.getLogger(__name__)

# Response text and its prompt in, reward out.
Judge = Callable[[str, Prompt], float]

# Keeps one odd answer from filling the log.
MAX_DETAIL_CHARS = 300


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A reward, or why there is none."""

    reward: float  # 0 where the judge failed
    failed: bool = False
    failure: str = ""  # kind of failure: the exception's name, "time-out" or "process died"
    error: str = ""  # one line: the kind and what happened


def failed_verdict(failure: str, detail: str) -> Verdict:
    """No reward, and why."""
    return Verdict(reward=0.0, failed=True, failure=failure, error=f"{failure}: {detail[:MAX_DETAIL_CHARS]}")


def ask(judge: Judge, response: str, prompt: Prompt) -> Verdict:
    """Ask a judge here and now; whatever it raises becomes a failed verdict."""
    try:
        reward = judge(response, prompt)
        # NumPy's and torch's scalars are welcome; text that looks like a number is a mistake.
        if not isinstance(reward, SupportsFloat) or not math.isfinite(float(reward)):
            return failed_verdict("bad reward", f"a judge must return a finite number, got {reward!r}")
        return Verdict(reward=float(reward))
    except (Exception, SystemExit) as error:  # a judge may be anyone's code: one bad answer must not end the run
        return failed_verdict(type(error).__name__, str(error))


class JudgePool(ABC):
    """Judges answers, possibly many at once, and counts what failed."""

    def __init__(self) -> None:
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
        """Answers whose judge raised, ran out of time or died."""
        return self.failures.total()

    def _count(self, verdict: Verdict) -> None:
        with self._lock:
            self.num_judged += 1
            if verdict.failed:
                self.failures[verdict.failure] += 1
        if verdict.failed and self.failures[verdict.failure] == 1:
            logger.warning("the judge failed, reward 0 (said once a kind, then only counted): %s", verdict.error)


class InlineJudge(JudgePool):
    """A judge that always ends soon, asked in the caller's thread."""

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self.judge = judge

    def submit(self, response: str, prompt: Prompt) -> Future[Verdict]:
        verdict = ask(self.judge, response, prompt)
        self._count(verdict)
        future: Future[Verdict] = Future()
        future.set_result(verdict)
        return future

    def close(self) -> None:
        """Nothing runs between calls."""
