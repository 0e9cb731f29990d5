"""The process that hosts one judge: answers come in through a pipe, verdicts go out.

Protocol: first "" when the judge is imported, or why it was not; then a Verdict for each (response, prompt).
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from multiprocessing.connection import Connection

from xrl.config import SettingsError
from xrl.launch.streams import prepare_streams
from xrl.rewards.judge import ANSWERS, Judge, ask
from xrl.rewards.load import load_judge, load_truth_check
from xrl.types import Prompt

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Serve one judge until the pipe closes.

    Arguments: sys.path (not ours), judge, pipe, the parent's process id, what it is asked about.
    """
    reference, pipe, parent_pid, asked_about = sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    end_with_parent(parent_pid)
    prepare_streams()  # a judge that prints must not fail because nobody reads
    # What the judge itself starts must not keep the pipe open.
    os.set_inheritable(pipe, False)
    with Connection(pipe) as connection:
        try:
            judge = load_judge(reference) if asked_about == ANSWERS else _judge_of_truths(reference)
        except SettingsError as error:
            connection.send(str(error))
            return
        try:
            connection.send("")
            while True:
                response, prompt = connection.recv()
                connection.send(ask(judge, response, prompt, catches=BaseException))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return  # the pool is gone


def _judge_of_truths(reference: str) -> Judge:
    """The judge's check of ground truths, in the form of a judge: reward 1 where it has nothing against one."""
    check = load_truth_check(reference)

    def judge(_: str, prompt: Prompt) -> float:
        if check is not None:
            check(prompt)
        return 1.0

    return judge


def end_with_parent(parent_pid: int) -> None:
    """Be killed when the parent dies, even by SIGKILL and in the middle of an endless judge.

    Elsewhere than on Linux the pipe's end does it, as soon as the judge returns.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # It may have died before we asked.
    if os.getppid() != parent_pid:
        sys.exit(1)
