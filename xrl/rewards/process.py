"""One judge's process, and the keeper above it, as the pool sees them: started, asked and ended, each within a time."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from xrl.rewards.descendants import alive_below, alive_of_session, kill_all
from xrl.rewards.framing import Asker, BadMessage
from xrl.rewards.judge import ANSWERS, clean
from xrl.rewards.limits import JudgeLimits, judge_environment
from xrl.rewards.messages import MAX_ERROR_CHARS, End, decode_end, decode_start
from xrl.rewards.worker import Order

# For importing the judge, once a process; not part of the time an answer may take.
START_LIMIT_S = 120.0
# For the keeper to end all that the judge has started and to say so; then it is done from here.
END_LIMIT_S = 1.5
# For what has been killed to be gone.
KILL_LIMIT_S = 1.0
MAX_LOG_BYTES = 10_000_000
# Of a log that explains why a judge did not start.
_TAIL_BYTES = 2_000
# Its processes are recognised by it, wherever they have gone to.
MARK_VARIABLE = "XRL_JUDGE"

# "xrl.rewards.worker" is what a list of processes shows of it.
CHILD = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from xrl.rewards.worker import main; main()"


@dataclass(frozen=True, kw_only=True)
class JudgeSetup:
    """Which judge, and what its processes may have."""

    reference: str  # as `load_judge` takes it; each process imports it for itself
    asked_about: str = ANSWERS  # or TRUTHS, to have its `check_truth` asked; the response is then not looked at
    limits: JudgeLimits = field(default_factory=JudgeLimits)
    variables: Sequence[str] = ()  # of the environment, besides those that every judge gets
    log_dir: Path | None = None  # where its output goes, a file a worker; None: nowhere


class JudgeProcess:
    """A judge's process: `start`, then `asker` answers, then `end` and `close`."""

    def __init__(self, setup: JudgeSetup, number: int) -> None:
        """
        Args:
            number: of the worker it belongs to, for the name of its log.
        """
        self.checks_truths = False
        self.is_ready = False
        self._mark = secrets.token_hex(16)
        self._log = _open_log(setup.log_dir, number)
        self._log_start = os.fstat(self._log).st_size
        questions, its_questions = socket.socketpair()
        control, its_control = socket.socketpair()
        self.asker = Asker(questions)
        self._control = control
        self._keeper = Asker(control)
        self._last_words: End | None = None
        self._has_heard = False
        # Held while its end is waited for, which two threads may want to know.
        self._lock = threading.Lock()
        order = Order(
            reference=setup.reference,
            asked_about=setup.asked_about,
            questions=its_questions.fileno(),
            control=its_control.fileno(),
            limits=setup.limits,
            max_log_bytes=MAX_LOG_BYTES,
        )
        with its_questions, its_control:
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-c", CHILD, json.dumps(sys.path), order.to_json()],
                    stdin=subprocess.DEVNULL,
                    stdout=self._log,
                    stderr=subprocess.STDOUT,
                    env={**judge_environment(setup.variables), MARK_VARIABLE: self._mark},
                    pass_fds=[its_questions.fileno(), its_control.fileno()],
                    # Neither the terminal nor its Ctrl-C reaches it.
                    start_new_session=True,
                )
            except OSError:
                self.close()
                raise

    def start(self) -> str:
        """Wait for the judge to be imported; an error text where it was not."""
        try:
            start = decode_start(self.asker.exchange(None, limit_s=START_LIMIT_S))
        except TimeoutError:
            return f"importing it took longer than {START_LIMIT_S:g} s"
        except BadMessage as error:
            return f"while it was imported, {error}"
        except EOFError:
            end = self.last_words()
            reason = end.detail if end is not None and end.failure else "its process ended while importing it"
            said = self._end_of_log()
            return f"{reason}; the last it wrote is {said!r}" if said else reason
        self.checks_truths = start.checks_truths
        self.is_ready = not start.error
        return start.error

    def last_words(self, limit_s: float = END_LIMIT_S) -> End | None:
        """How it ended, as its keeper says; None where it has not ended by then, or the keeper is gone."""
        with self._lock:
            if not self._has_heard:
                try:
                    self._last_words = decode_end(self._keeper.exchange(None, limit_s=limit_s))
                    self._has_heard = True
                except (EOFError, BadMessage):
                    self._has_heard = True
                except TimeoutError:
                    pass
            return self._last_words

    def let_go(self) -> None:
        """Tell the keeper to end it, from any thread, without waiting."""
        with contextlib.suppress(OSError):  # it has gone
            self._control.shutdown(socket.SHUT_WR)

    def end(self, limit_s: float = END_LIMIT_S) -> None:
        """End the judge, all it has started, and its keeper. From any thread, and bounded whatever they are doing.

        Args:
            limit_s: for the keeper to do it; then it is done from here.
        """
        self.let_go()
        if self.last_words(limit_s) is None and self._process.returncode is None:
            # The keeper was stopped or killed. It is not reaped yet, so that nobody else can have its id.
            kill_all(self._alive, limit_s=KILL_LIMIT_S)
        try:
            self._process.wait(KILL_LIMIT_S)
        except subprocess.TimeoutExpired:  # it hangs in the kernel: it is killed when that lets it go
            self._process.kill()

    def close(self) -> None:
        """After `end`, by the thread that asks."""
        self.asker.close()
        self._keeper.close()
        if self._log >= 0:
            os.close(self._log)
            self._log = -1

    def _alive(self) -> set[int]:
        keeper = self._process.pid
        own = f"{MARK_VARIABLE}={self._mark}".encode()
        return {*alive_below(keeper), *alive_of_session(keeper, own)}

    def _end_of_log(self) -> str:
        """The last line it has written, if any."""
        size = os.fstat(self._log).st_size
        start = max(self._log_start, size - _TAIL_BYTES)
        lines = os.pread(self._log, size - start, start).decode(errors="replace").splitlines()
        return clean(next((line for line in reversed(lines) if line.strip()), ""), MAX_ERROR_CHARS)


def _open_log(folder: Path | None, number: int) -> int:
    """A file for its output: in the run's folder, or without a name."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    try:
        if folder is not None:
            return os.open(folder / f"judge_{number}.log", flags, 0o666)
        with tempfile.TemporaryFile() as file:
            return os.dup(file.fileno())
    except OSError:  # no room for a file: it is judged all the same
        return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
