"""Somebody else's code tried out in a process of its own: there it may hang, crash, print, or use up the memory.

The process is a module of ours, started with a question. It answers with a JSON object on its standard output.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from xrl.config.errors import SettingsError
from xrl.launch.children import module_command
from xrl.launch.hearing import unblock_signals
from xrl.launch.signals import stop_with_parent
from xrl.launch.start import forgive_warnings_of_others

# A process that was killed is gone at once, but for one that hangs in the kernel.
_END_S = 5.0


class TrialProcess:
    """The process, from its start on: it works while other things are checked. Call `end` in any case."""

    def __init__(self, module: str, question: str, *, environment: Mapping[str, str]) -> None:
        """
        Args:
            module: of ours; it calls `answer_once`.
            environment: all its variables.
        """
        self.process = subprocess.Popen(
            [*module_command(module), question],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=dict(environment),
            # Out of the terminal's process group: Ctrl-C reaches us, and we end it.
            process_group=0,
        )

    def answer(self, *, who: str, limit_s: float) -> dict[str, Any]:
        """Wait for the answer.

        Args:
            who: what is tried out; begins the sentence where there is no answer.

        Raises:
            SettingsError: the answer is what is `refused`, it does not come in time, or the process ended without one.
        """
        try:
            out, errors = self.process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired as error:
            raise SettingsError(f"{who} was not loaded and tried out within {limit_s:g} s") from error
        try:
            answer: dict[str, Any] = json.loads(out)
        except ValueError as error:  # it ended before it could say anything
            raise SettingsError(f"{who} ended the process that tried it out: {self._last_words(errors)}") from error
        if "refused" in answer:
            raise SettingsError(answer["refused"])
        return answer

    def end(self) -> None:
        """End the process, if it has not ended, with what it has started."""
        if self.process.poll() is None:  # it is not reaped yet, so that nobody else can have its id
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.communicate(timeout=_END_S)

    def _last_words(self, errors: bytes) -> str:
        code = self.process.returncode
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        lines = errors.decode(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        return f"{how}, {last}" if last else how


def answer_once(answer_to: Callable[[str], Mapping[str, Any]]) -> None:
    """The process's side: answer the question that it was started with, and end with all that was started for it."""
    unblock_signals()
    # The answer alone goes to stdout: whatever a library prints there would spoil it.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    forgive_warnings_of_others()
    stop_with_parent()
    with out:
        json.dump(answer_to(sys.argv[1]), out)
    if os.getpgrp() == os.getpid():  # what is left in the group would keep our end of the pipes open
        os.killpg(os.getpid(), signal.SIGKILL)
