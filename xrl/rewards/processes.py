"""Judges that may hang or crash, each in a process that is killed from outside when its time is up.

One thread and one child process a worker, with a pipe of its own: killing a child spoils nothing that
the others use. The children are fresh interpreters (`xrl.rewards.worker`), not copies of the trainer:
they run none of its code, load no torch, and end with it.

    caller --submit--> queue --> worker thread --pipe--> child process
           <--future--------------- verdict <----pipe----
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing import Pipe

from xrl.launch.children import child_environment
from xrl.rewards.judge import ANSWERS, JudgePool, Verdict, failed_verdict
from xrl.types import Prompt

# For importing the judge, once a process; not part of the time an answer may take.
START_LIMIT_S = 120.0
# A judge whose processes fail to start this often in a row is not tried again by that worker.
MAX_FAILED_STARTS = 3
# Killed children end at once; this only bounds the wait for a worker thread that is in the middle of a start.
CLOSE_LIMIT_S = 5.0
# For a child that has closed its pipe to end by itself, so that what is said about it is true.
END_LIMIT_S = 1.0

CHILD = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from xrl.rewards.worker import main; main()"


@dataclass(frozen=True, kw_only=True)
class _Task:
    response: str
    prompt: Prompt
    future: Future[Verdict] = field(default_factory=Future)


class ProcessJudges(JudgePool):
    """A judge in `num_workers` processes, started at the first answer."""

    def __init__(
        self,
        reference: str,
        *,
        timeout_s: float,
        num_workers: int,
        failed_reward: float | None = None,
        asked_about: str = ANSWERS,
        speaks: bool = True,
    ) -> None:
        """
        Args:
            reference: as `load_judge` takes it; each process imports it for itself.
            timeout_s: an answer judged longer than this costs the process its life and has failed.
            failed_reward, speaks: as the pool's.
            asked_about: ANSWERS, or TRUTHS to have the judge's `check_truth` asked; the response is then not looked at.
        """
        super().__init__(failed_reward=failed_reward, speaks=speaks)
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._workers = [_Worker(reference, timeout_s, asked_about) for _ in range(num_workers)]
        self._threads = [threading.Thread(target=self._serve, args=(worker,), daemon=True) for worker in self._workers]
        self._start_lock = threading.Lock()
        self._started = False
        self._closed = False

    def submit(self, response: str, prompt: Prompt) -> Future[Verdict]:
        task = _Task(response=response, prompt=prompt)
        # Queued under the lock: behind the end that `close` puts there, no thread would see it.
        with self._start_lock:
            if self._closed:
                raise RuntimeError("the judge pool is closed")
            if not self._started:
                self._started = True
                for thread in self._threads:
                    thread.start()
            self._tasks.put(task)
        return task.future

    def close(self) -> None:
        with self._start_lock:
            started, self._started, self._closed = self._started, False, True
        if not started:
            return
        for worker in self._workers:
            worker.close()
            self._tasks.put(None)
        for thread in self._threads:
            thread.join(CLOSE_LIMIT_S)

    def _serve(self, worker: _Worker) -> None:
        """A worker thread's life."""
        while (task := self._tasks.get()) is not None:
            if self._closed:
                task.future.cancel()
            elif task.future.set_running_or_notify_cancel():
                try:
                    verdict = worker.judge(task.response, task.prompt)
                    # By closing we killed it ourselves.
                    task.future.set_result(verdict if self._closed else self._settle(verdict))
                except Exception as error:  # a future left open would make its owner wait forever
                    task.future.set_exception(error)


class _Worker:
    """Asks one child process at a time, and starts another where the last one is gone."""

    def __init__(self, reference: str, timeout_s: float, asked_about: str) -> None:
        self.reference = reference
        self.asked_about = asked_about
        self.timeout_s = timeout_s
        self.child: _Child | None = None
        self.num_failed_starts = 0
        self.last_start_failure: Verdict | None = None
        self.closed = False
        # Held while a child is started or taken away, never while one is judging: `close` must not wait for it.
        self.lock = threading.Lock()

    def judge(self, response: str, prompt: Prompt) -> Verdict:
        if self.num_failed_starts >= MAX_FAILED_STARTS and self.last_start_failure:
            return self.last_start_failure
        child = self._running_child()
        if child is None:
            return failed_verdict("closed", "the run ended before the answer was judged")
        if not child.ready:
            error = child.wait_until_ready()
            if error:
                self._drop()
                self.num_failed_starts += 1
                self.last_start_failure = failed_verdict("judge did not start", error)
                return self.last_start_failure
            self.num_failed_starts = 0
        verdict = child.ask(response, prompt, self.timeout_s)
        if verdict is None:
            child.let_end()
            self._drop()
            return failed_verdict("process died", f"the process of {self.reference} {child.how_it_ended()}")
        if verdict.failure == "time-out":
            self._drop()
        return verdict

    def close(self) -> None:
        """Kill the child, from any thread; the thread that waits for it sees the pipe's end."""
        with self.lock:
            self.closed = True
            if self.child:
                self.child.kill()

    def _running_child(self) -> _Child | None:
        with self.lock:
            if self.child is None and not self.closed:
                self.child = _Child(self.reference, self.asked_about)
            return None if self.closed else self.child

    def _drop(self) -> None:
        with self.lock:
            if self.child:
                self.child.kill()
                self.child.connection.close()
                self.child = None


class _Child:
    """One judge process and our end of its pipe."""

    def __init__(self, reference: str, asked_about: str) -> None:
        self.reference = reference
        self.connection, theirs = Pipe()
        self.ready = False
        with theirs:
            arguments = [json.dumps(sys.path), reference, str(theirs.fileno()), str(os.getpid()), asked_about]
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", CHILD, *arguments],
                stdin=subprocess.DEVNULL,
                env=child_environment(),
                pass_fds=[theirs.fileno()],
                # A group of its own: killed with whatever it started, and not stopped halfway by Ctrl-C.
                process_group=0,
            )

    def wait_until_ready(self) -> str:
        """Wait for the judge to be imported; an error text where it was not."""
        try:
            if not self.connection.poll(START_LIMIT_S):
                return f"importing it took longer than {START_LIMIT_S:g} s"
            error: str = self.connection.recv()
            self.ready = not error
            return error
        except (EOFError, OSError):
            return "its process ended while importing it"

    def ask(self, response: str, prompt: Prompt, timeout_s: float) -> Verdict | None:
        """The verdict, a failed one when time ran out, None when the process is gone."""
        try:
            self.connection.send((response, prompt))
            if not self.connection.poll(timeout_s):
                return failed_verdict("time-out", f"no reward within {timeout_s:g} s from {self.reference}")
            verdict: Verdict = self.connection.recv()
            return verdict
        except (EOFError, OSError):
            return None

    def let_end(self) -> None:
        """Give it a moment to end by itself. It is not reaped: `kill` still has its group to end."""
        end = time.monotonic() + END_LIMIT_S
        with contextlib.suppress(ChildProcessError):  # reaped meanwhile, by `close`
            while time.monotonic() < end and hasattr(os, "waitid"):
                if os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG):
                    return
                time.sleep(0.01)

    def kill(self) -> None:
        # Not reaped yet, so that neither its id nor its group's can be another's.
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def how_it_ended(self) -> str:
        """After `kill`."""
        code = self.process.returncode
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
