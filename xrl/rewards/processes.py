"""Judges that may hang or crash, each in a process that is killed from outside when its time is up.

One thread and one child process a worker, with a socket of its own: killing a child spoils nothing that
the others use. The children are fresh interpreters (`xrl.rewards.worker`), not copies of the trainer:
they run none of its code, load no torch, and end with it.

    caller --submit--> queue --> worker thread --socket--> judge's process, below its keeper
           <--future--------------- verdict <----socket----
"""

from __future__ import annotations

import dataclasses
import queue
import re
import signal
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field

from xrl.config import SettingsError
from xrl.rewards.framing import BadMessage
from xrl.rewards.judge import JudgePool, failed_verdict
from xrl.rewards.limits import withheld_variable
from xrl.rewards.messages import decode_verdict, encode_prompt, encode_question
from xrl.rewards.process import END_LIMIT_S, JudgeProcess, JudgeSetup
from xrl.types import Prompt, Verdict

# A judge whose processes fail to start this often in a row is not tried again by that worker.
MAX_FAILED_STARTS = 3
# Killed children end at once; this only bounds the wait for a worker thread that is in the middle of a start.
CLOSE_LIMIT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class _Task:
    response: str
    prompt: Prompt
    future: Future[Verdict] = field(default_factory=Future)


class ProcessJudges(JudgePool):
    """A judge in `num_workers` processes, started at the first answer."""

    def __init__(
        self,
        setup: JudgeSetup,
        *,
        timeout_s: float,
        num_workers: int,
        failed_reward: float | None = None,
        speaks: bool = True,
    ) -> None:
        """
        Args:
            timeout_s: an answer judged longer than this costs the process its life and has failed.
            failed_reward, speaks: as the pool's.
        """
        super().__init__(failed_reward=failed_reward, speaks=speaks)
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._workers = [_Worker(setup, number, timeout_s) for number in range(num_workers)]
        self._threads = [threading.Thread(target=self._serve, args=(worker,), daemon=True) for worker in self._workers]
        self._start_lock = threading.Lock()
        self._started = False
        self._closed = False

    def start_one(self) -> bool:
        """Start one process now, before anything is submitted; returns whether the judge can check ground truths.

        Raises:
            SettingsError: it cannot be imported.
        """
        return self._workers[0].start()

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
        # All at once, then one after the other.
        for worker in self._workers:
            worker.let_go()
        deadline = time.monotonic() + END_LIMIT_S
        for worker in self._workers:
            worker.close(deadline)
        if not started:
            for worker in self._workers:
                worker.drop()
            return
        for _ in self._workers:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join(CLOSE_LIMIT_S)

    def _serve(self, worker: _Worker) -> None:
        """A worker thread's life."""
        # Unbounded: `close` puts an end there for each thread.
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
        worker.drop()


class _Worker:
    """Asks one judge's process at a time, and starts another where the last one is gone."""

    def __init__(self, setup: JudgeSetup, number: int, timeout_s: float) -> None:
        self.setup = setup
        self.number = number
        self.timeout_s = timeout_s
        self.process: JudgeProcess | None = None
        self.num_failed_starts = 0
        self.last_start_failure: Verdict | None = None
        self.closed = False
        # Held while a process is started or taken away, never while one is judging: `close` must not wait for it.
        self.lock = threading.Lock()
        self._num_asked = 0
        self._last_prompt: tuple[Prompt, bytes] | None = None  # and what of a question it makes

    def start(self) -> bool:
        """As the pool's `start_one`."""
        process, error = self._ready_process()
        if process is None:
            raise SettingsError(error or "the judge was closed before it started")
        return process.checks_truths

    def judge(self, response: str, prompt: Prompt) -> Verdict:
        if self.num_failed_starts >= MAX_FAILED_STARTS and self.last_start_failure:
            return self.last_start_failure
        process, error = self._ready_process()
        if error:
            self.num_failed_starts += 1
            self.last_start_failure = failed_verdict("judge did not start", error)
            return self.last_start_failure
        if process is None:
            return failed_verdict("closed", "the run ended before the answer was judged")
        self.num_failed_starts = 0
        self._num_asked += 1
        try:
            question = encode_question(self._num_asked, response, self._encoded(prompt))
        except ValueError as error:
            return failed_verdict("not carried", f"the prompt holds {error}, which a judge's process cannot be given")
        return self._ask(process, question)

    def let_go(self) -> None:
        """Tell the process to end, from any thread, without waiting; no other is started."""
        with self.lock:
            self.closed = True
            if self.process:
                self.process.let_go()

    def close(self, deadline: float) -> None:
        """End the process, from any thread; the thread that waits for it sees its socket's end."""
        with self.lock:
            if self.process:
                self.process.end(max(0.0, deadline - time.monotonic()))

    def drop(self) -> None:
        """End the process and forget it; by the thread that asks it."""
        with self.lock:
            if self.process:
                self.process.end()
                self.process.close()
                self.process = None

    def _ask(self, process: JudgeProcess, question: bytes) -> Verdict:
        reference = self.setup.reference
        try:
            return self._hinted(
                decode_verdict(process.asker.exchange(question, limit_s=self.timeout_s), self._num_asked)
            )
        except TimeoutError as error:
            so_far = f": {error}" if str(error) else ""
            verdict = failed_verdict("time-out", f"no reward within {self.timeout_s:g} s from {reference}{so_far}")
        except BadMessage as error:
            verdict = failed_verdict("bad message", f"the process of {reference} broke the protocol: {error}")
        except EOFError:
            verdict = _death(process, reference)
        self.drop()
        return verdict

    def _hinted(self, verdict: Verdict) -> Verdict:
        if verdict.failure != "KeyError":
            return verdict
        hint = withheld_variable(verdict.detail, self.setup.variables)
        return dataclasses.replace(verdict, detail=verdict.detail + hint)

    def _encoded(self, prompt: Prompt) -> bytes:
        if self._last_prompt is None or self._last_prompt[0] is not prompt:
            self._last_prompt = prompt, encode_prompt(prompt)
        return self._last_prompt[1]

    def _ready_process(self) -> tuple[JudgeProcess | None, str]:
        """A process that can be asked, started where there is none; else None, and why it does not start, if it does
        not."""
        try:
            with self.lock:
                if self.process is None and not self.closed:
                    self.process = JudgeProcess(self.setup, self.number)
                process = None if self.closed else self.process
            error = "" if process is None or process.is_ready else process.start()
        except OSError as failure:  # no more processes, files or memory
            process, error = None, f"its process cannot be started: {failure.strerror or failure}"
        if not error:
            return process, ""
        self.drop()
        if not error.startswith("--judge"):
            error = f"--judge {self.setup.reference}: {error}"
        key = re.search(r"KeyError: ('\w+')", error)
        return None, error + (withheld_variable(key[1], self.setup.variables) if key else "")


def _death(process: JudgeProcess, reference: str) -> Verdict:
    """What is said of a judge whose socket has closed."""
    end = process.last_words()
    if end is not None and end.failure:
        return failed_verdict(end.failure, end.detail)
    if end is None or end.code is None:
        how = "closed its socket, or was ended from outside"
    elif end.code >= 0:
        how = f"exited with code {end.code}"
    else:
        how = f"was ended by {_signal_name(-end.code)}"
    return failed_verdict("process died", f"the process of {reference} {how}")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # one of the real-time signals
        return f"signal {number}"
