"""An algorithm of the user's own, built once before anything is started, in a process of its own.

It is the user's code that runs: it may hang, or end the process that it runs in.

    python -P -m xrl.algorithms.trial QUESTION      QUESTION and the answer on stdout are JSON
"""

from __future__ import annotations

import dataclasses
import json
import signal
from types import FrameType, TracebackType
from typing import Any, NoReturn

from xrl.algorithms.own import create_own
from xrl.config import AlgorithmConfig, SettingsError
from xrl.launch.children import child_environment
from xrl.launch.trial import TrialProcess, answer_once

# As for the import of a judge: that of torch from a slow disk included.
LIMIT_S = 120.0
# For the process to start, and to say where the user's code was when its time was up.
_GRACE_S = 30.0


class AlgorithmTrial:
    """The process, from `with` on: it works while other things are checked, and ends with the block."""

    def __init__(self, config: AlgorithmConfig, *, limit_s: float = LIMIT_S) -> None:
        """
        Args:
            config: names a class of the user's own.
            limit_s: for importing and building it.
        """
        self.config, self.limit_s = config, limit_s

    def __enter__(self) -> AlgorithmTrial:
        question = json.dumps({"config": dataclasses.asdict(self.config), "limit_s": self.limit_s})
        self._trial = TrialProcess("xrl.algorithms.trial", question, environment=child_environment())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._trial.end()

    def finish(self) -> None:
        """Wait until it is built.

        Raises:
            SettingsError: what `create_own` refuses, or that it takes too long: with the user's file and line. Or what
                the process ended of.
        """
        self._trial.answer(who=f"--algorithm {self.config.algorithm}", limit_s=self.limit_s + _GRACE_S)


def answer_to(question: str) -> dict[str, Any]:
    """What the process answers: what is `refused`, as a sentence, or nothing."""
    asked = json.loads(question)
    limit_s = asked["limit_s"]

    def give_up(number: int, frame: FrameType | None) -> NoReturn:
        raise TimeoutError(f"it took longer than {limit_s:g} s")

    signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        create_own(AlgorithmConfig(**asked["config"]))
    except SettingsError as error:
        return {"refused": str(error)}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return {}


if __name__ == "__main__":
    answer_once(answer_to)
