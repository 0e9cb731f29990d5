"""The process above one judge: keeps its output, holds it to its limits, and ends all that it has started.

    pool --control--> keeper --fork--> judge --> whatever it starts
      ^----------- questions and verdicts --^

It runs nothing of the judge's. Processes whose own parents have gone become its children, also those in sessions of
their own, so that it finds them all. When the pool closes its end of the control socket, or is killed, the keeper ends
the judge with everything below it, and then itself; so it does when the judge ends or goes over a limit.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
import time
import traceback
from types import FrameType

from xrl.rewards import framing
from xrl.rewards.descendants import alive_below, kill_all
from xrl.rewards.limits import JudgeLimits
from xrl.rewards.messages import End, encode_end
from xrl.rewards.output import CappedOutput
from xrl.rewards.watch import Excess, Watch

# For what hangs in the kernel; it is killed already, and ends when that lets it go.
KILL_LIMIT_S = 2.0
# For the last word to the pool.
SAY_LIMIT_S = 1.0
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
# Whoever sends one of these wants the judge to end.
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def keep(control: socket.socket, questions: socket.socket, limits: JudgeLimits, *, max_log_bytes: int) -> None:
    """Split into keeper and judge: returns in the judge's process, under its limits. The keeper's never returns.

    Args:
        control: to the pool; closed in the judge's process.
        questions: the judge's socket; closed in the keeper's process.
        max_log_bytes: how much of the judge's output goes on to our standard output, which is its log.
    """
    keeper_pid = os.getpid()
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    wake_end, waker = os.pipe()
    output_end, output = os.pipe()
    for end in (wake_end, waker, output_end):
        os.set_blocking(end, False)
    judge_pid = os.fork()
    if judge_pid == 0:
        control.close()
        for end in (wake_end, waker, output_end):
            os.close(end)
        _become_judge(output, keeper_pid)
        limits.apply()
        return
    questions.close()
    os.close(output)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, *_STOP_SIGNALS):
        signal.signal(number, _only_wake)
    try:
        log = CappedOutput(sys.stdout.fileno(), max_log_bytes)
        _Keeper(control, wake_end, output_end, judge_pid).run(Watch(os.getpid(), limits), log)
    except Exception:
        traceback.print_exc()  # into the judge's log; the pool ends what we have not ended
    os._exit(0)


def _become_judge(output: int, keeper_pid: int) -> None:
    # A group of its own: a judge that ends its group ends itself.
    os.setpgid(0, 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != keeper_pid:  # it ended before we asked
        os._exit(1)


def _only_wake(number: int, frame: FrameType | None) -> None:
    """The number has been written to the wake-up pipe."""


class _Keeper:
    def __init__(self, control: socket.socket, wake_end: int, output: int, judge_pid: int) -> None:
        """
        Args:
            control: to the pool.
            wake_end, output: pipes: numbers of signals that have come, what the judge writes.
        """
        self.control = control
        self.wake_end = wake_end
        self.output = output
        self.judge_pid = judge_pid
        self.parent_pid = os.getppid()
        self.code: int | None = None  # of the judge, once it has ended

    def run(self, watch: Watch, log: CappedOutput) -> None:
        """Until the judge and all below it have ended, for whatever reason, and the pool has been told."""
        excess = self._wait_for_an_end(watch, log)
        # Its group in one go, which a fork bomb cannot outrun, then what has left the group.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.judge_pid, signal.SIGKILL)
        kill_all(lambda: alive_below(os.getpid()), limit_s=KILL_LIMIT_S, reap=self._reap)
        self._reap()
        log.take_from(self.output)
        log.end()
        end = End(code=self.code, failure=excess.failure if excess else "", detail=excess.detail if excess else "")
        with contextlib.suppress(OSError):  # the pool is gone
            self.control.settimeout(SAY_LIMIT_S)
            framing.send(self.control, encode_end(end))

    def _wait_for_an_end(self, watch: Watch, log: CappedOutput) -> Excess | None:
        """Until the pool has gone, the judge has ended or has gone over a limit: which one, then."""
        poll = select.poll()
        for descriptor in (self.control.fileno(), self.wake_end, self.output):
            poll.register(descriptor, select.POLLIN)
        next_look = time.monotonic()
        while True:
            ready = dict(poll.poll(max(1.0, 1000 * (next_look - time.monotonic()))))
            if self.control.fileno() in ready:
                return None
            if self.output in ready and not log.take_from(self.output):
                poll.unregister(self.output)
            if self.wake_end in ready and not set(_STOP_SIGNALS).isdisjoint(os.read(self.wake_end, 4096)):
                return None
            self._reap()
            # Without its parent it is alone, even where a copy of the other end of the socket lives on somewhere.
            if self.code is not None or os.getppid() != self.parent_pid:
                return None
            if time.monotonic() >= next_look:
                excess = watch.excess()
                if excess is not None:
                    return excess
                next_look = time.monotonic() + watch.pause_s

    def _reap(self) -> None:
        """Take note of children that have ended: the judge, and those that came to us."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.judge_pid:
                self.code = os.waitstatus_to_exitcode(status)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
