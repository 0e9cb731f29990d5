"""What a run is asked to do before its work is done: stop where nothing is lost.

    a signal        SIGTERM, SIGUSR1, SIGUSR2 or the first Ctrl-C, to any process of the run
    a file          `stop` in the run's folder, which anybody on any host may make
    the time        --exit-before 55m

`StopRequest` knows whether, `RunSignals` and `PassedOn` what a signal means to a rank and to the command above the
ranks. The run itself stops at its next boundary between two steps (xrl/stopping.py).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from xrl.config.errors import SettingsError
from xrl.config.numbers import whole_number
from xrl.config.printable import shown
from xrl.launch.signals import Stopped

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again
# Between looks at the file.
LOOK_S = 1.0
# Between looks for ranks that have been started: at first, and later on.
PASS_S, LAST_PASS_S = 0.1, 2.0
SLURM_START = "SLURM_JOB_START_TIME"
_CAUSE_FILE = "xrl-asked-to-stop"


class StopAsked(Exception):
    """What is under way is cut off, as the run is asked to stop."""


@dataclass(frozen=True, kw_only=True)
class TimeLimit:
    """When a run shall have ended, its last save included."""

    flag: str  # as the user wrote it
    seconds: float  # from the start of the job
    start: float  # of the job, in seconds of `time.time`


class StopRequest:
    """Whether a run is asked to stop, and by what. Asked and looked at from any thread."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        """
        Args:
            clock: seconds since the epoch.
        """
        self._clock = clock
        self._cause: str | None = None
        self._file: Path | None = None
        self._limit: TimeLimit | None = None
        self._last_look = float("-inf")
        self._longest_update_s = self._longest_save_s = 0.0
        self.has_begun = False  # there is work that would be lost: requests wait for the end of a step
        self.fails = False  # the process ends by an error: nothing waits any more
        self.signal: signal.Signals | None = None  # the first that asked

    def begin(self) -> None:
        """From now on there is something to save."""
        self.has_begun = True

    def watch_file(self, file: Path) -> None:
        """Take this file for a request. Whoever begins a run removes one that asked an earlier attempt."""
        self._file = file

    def watch_time(self, limit: TimeLimit) -> None:
        """Stop before the job is that old."""
        self._limit = limit

    def updated(self, seconds: float) -> None:
        """The rest of a step, after its rollout, took so long."""
        self._longest_update_s = max(self._longest_update_s, seconds)

    def saved(self, seconds: float) -> None:
        """A save took so long."""
        self._longest_save_s = max(self._longest_save_s, seconds)

    def ask(self, cause: str, number: signal.Signals | None = None) -> None:
        """Ask it to stop. Who asks first is named at its end.

        Args:
            number: the signal that asked.
        """
        self._cause = self._cause or cause
        self.signal = self.signal or number

    def asked(self, *, looks_again: bool = True) -> str | None:
        """What asked the run to stop; None: nothing has.

        Args:
            looks_again: for the file, even where that was done within the last second.
        """
        now = self._clock()
        if self._cause is None and self._file is not None and (looks_again or now - self._last_look >= LOOK_S):
            self._last_look = now
            if _is_there(self._file):
                self.ask(f"the file {self._file}")
        if self._cause is None and self._limit is not None and now - self._limit.start >= self._time_left_at():
            self.ask(f"--exit-before {self._limit.flag}")
        return self._cause

    def check(self) -> None:
        """Called again and again while the run waits for answers.

        Raises:
            StopAsked: it is asked to stop.
        """
        cause = self.asked(looks_again=False)
        if cause is not None:
            raise StopAsked(cause)

    def _time_left_at(self) -> float:
        """The last moment, in seconds from the job's start, to begin an update and the save after it."""
        assert self._limit is not None
        # As long as nothing was saved, a save is taken for as long as an update.
        return self._limit.seconds - self._longest_update_s - (self._longest_save_s or self._longest_update_s)


def job_start(environment: Mapping[str, str], process_start: float) -> float:
    """When the job began, in seconds since the epoch: Slurm's word for it, else this process's start.

    Raises:
        SettingsError: what is in Slurm's variable is no time.
    """
    text = environment.get(SLURM_START)
    if text is None:
        return process_start
    seconds = whole_number(text)
    if seconds is None or seconds < 0:
        raise SettingsError(f"the variable {SLURM_START} must be a time in seconds since 1970, found {shown(text)}")
    return float(seconds)


def _is_there(file: Path) -> bool:
    """Opened, not looked up: NFS asks its server anew for what is opened."""
    try:
        with file.open("rb"):
            return True
    except OSError:
        return False


class CauseFile:
    """Where the processes of one host tell each other who asked: a signal that is passed on has lost its name."""

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: of the command above the ranks.
        """
        self._file = folder / _CAUSE_FILE

    def note(self, cause: str) -> None:
        """The first word stays."""
        with contextlib.suppress(OSError), self._file.open("x") as file:
            file.write(cause)

    def read(self) -> str | None:
        """What was noted first; None where nothing is."""
        try:
            return self._file.read_text() or None
        except OSError:
            return None


class RunSignals:
    """What signals mean to a rank.

    As long as there is nothing to save, each of them ends it at once. Afterwards they are requests; a second Ctrl-C or
    SIGTERM ends it at once. The command above it, `xrl train`, passes on requests as SIGUSR1; its SIGTERM says that
    another rank has failed. torchrun says both by SIGTERM: that is taken for a request, and where a rank has failed the
    next collective ends this one.
    """

    def __init__(
        self,
        stop: StopRequest,
        end: Callable[[SystemExit], None],
        *,
        launcher: int | None = None,
        causes: CauseFile | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """
        Args:
            stop: is asked.
            end: raises in the main thread.
            launcher: id of the process that started this rank and ends it; None where there is none.
            causes: shared with the launcher, where that is `xrl train`.
            say: tells the user that a Ctrl-C is heard.
        """
        self._stop, self._end = stop, end
        self._launcher, self._causes, self._say = launcher, causes, say
        self._is_repeated = False  # the next Ctrl-C or SIGTERM is

    def hear(self, number: signal.Signals, sender: int) -> None:
        """React to one signal, in the thread that hears them."""
        if number == signal.SIGINT and self._causes is not None:
            return  # a terminal sends it to every process; the one above decides
        if self._is_order(number, sender):
            self._end(Stopped(number))
        elif self._stop.has_begun:
            self._ask(number, sender)
        else:
            if self._causes is not None:
                self._causes.note(number.name)
            self._end(early_end(number))

    def _ask(self, number: signal.Signals, sender: int) -> None:
        is_first = self._stop.signal is None
        self._stop.ask((self._causes.read() if self._causes else None) or number.name, number)
        if is_first and number == signal.SIGINT:
            self._say("stopping at the end of this step; Ctrl-C again ends at once")
        if is_first and self._causes and self._launcher is not None and sender != self._launcher:
            self._causes.note(number.name)
            with contextlib.suppress(OSError):  # it tells the other ranks
                os.kill(self._launcher, signal.SIGUSR1)

    def _is_order(self, number: signal.Signals, sender: int) -> bool:
        """Whether it is to end now; this process itself says so when the one above it is gone."""
        if number == signal.SIGHUP or sender == os.getpid() or self._stop.fails:
            return True
        if sender == self._launcher:
            return self._causes is not None and number == signal.SIGTERM
        may_repeat = number in (signal.SIGINT, signal.SIGTERM)
        is_order = may_repeat and self._is_repeated
        self._is_repeated |= may_repeat
        return is_order


class PassedOn:
    """What signals mean to the command above the ranks: it passes requests on, and waits for the ranks to end.

    For how long is up to them: a step may take minutes. A second Ctrl-C or SIGTERM ends them at once.
    """

    def __init__(
        self,
        end: Callable[[SystemExit], None],
        children: Callable[[], list[int]],
        causes: CauseFile,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """
        Args:
            end: raises in the main thread.
            children: ids of the ranks that are there.
            causes: shared with them.
            say: tells the user that a Ctrl-C is heard.
        """
        self._end, self._children, self._causes, self._say = end, children, causes, say
        self._is_repeated = False
        self._asked: set[int] = set()
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None

    def hear(self, number: signal.Signals, sender: int) -> None:
        """React to one signal, in the thread that hears them."""
        may_repeat = number in (signal.SIGINT, signal.SIGTERM)
        if number == signal.SIGHUP or (may_repeat and self._is_repeated):
            self._end(Stopped(number))
            return
        self._is_repeated |= may_repeat
        if number == signal.SIGINT:
            self._say("stopping at the end of this step; Ctrl-C again ends at once")
        self._causes.note(number.name)
        if self._thread is None:
            self._thread = threading.Thread(target=self._pass_on, name="pass-on", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """The ranks have ended."""
        self._is_over.set()

    def _pass_on(self) -> None:
        """To each rank once, also to those that are still being started."""
        pause_s = PASS_S
        while not self._is_over.is_set():
            for child in self._children():
                if child not in self._asked:
                    self._asked.add(child)
                    with contextlib.suppress(OSError):
                        os.kill(child, signal.SIGUSR1)
            self._is_over.wait(pause_s)
            pause_s = min(2 * pause_s, LAST_PASS_S)


def early_end(number: signal.Signals) -> Stopped:
    """The end of a process that has nothing to save yet: a scheduler may start it again, unlike who pressed Ctrl-C."""
    return Stopped(number, None if number == signal.SIGINT else EXIT_STOPPED)
