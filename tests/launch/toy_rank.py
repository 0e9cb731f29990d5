"""A rank in miniature: works, fails or waits as told, and notes in a folder what it did.

`toy_rank.py FOLDER WHAT`, and `with words` after it for a rank 0 that knows what is left of the run.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

from xrl.config import SettingsError
from xrl.launch.exit import RunEnded, RunFailed, announce_errors, run_main

FOLDER, WHAT = Path(sys.argv[1]), sys.argv[2]
RANK = int(os.environ.get("RANK", "0"))
FOR_EVER_S = 600.0


def note(what: str) -> None:
    """At once: whoever sees the file can read it."""
    unfinished = FOLDER / f"{what}-{RANK}.unfinished"
    unfinished.write_text(str(os.getpid()))
    unfinished.rename(FOLDER / f"{what}-{RANK}")


def clean_up() -> None:
    if WHAT == "hang in clean-up":
        note("hangs")
        time.sleep(FOR_EVER_S)
    if WHAT == "slow clean-up":
        note("cleaning")
        time.sleep(1.0)
    note("cleaned")
    if WHAT == "fail in clean-up too":
        raise OSError("the second error")


def work() -> None:
    if WHAT == "bad settings":
        raise SettingsError("--lr must be >= 0, got -1")
    if WHAT in ("fail", "fail in clean-up too", "hang in clean-up"):
        raise ValueError("the first error")
    if WHAT == "stop with a message":
        sys.exit("no more work")
    if WHAT == "end itself":
        raise RunEnded("nothing more to do" if RANK == 0 else "")
    if WHAT == "fail for a worker":
        raise RunFailed("rollout worker 0 (10.0.0.2:80): connection refused")
    if WHAT in ("wait", "slow clean-up"):
        note("waits")
        time.sleep(FOR_EVER_S)
    if WHAT in ("wait in a collective", "fail in one rank"):
        wait_in_collective()


def wait_in_collective() -> None:
    """Each rank waits for a tensor from the other, inside torch; or rank 0 fails and rank 1 waits for it."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    dist.barrier()
    note("waits")
    if WHAT == "fail in one rank" and RANK == 0:
        raise ValueError("the first error")
    dist.recv(torch.zeros(1), src=1 - RANK)


def words_about(error: BaseException) -> str:
    return "after rollout 3 of 9; run folder here" if RANK == 0 and "with words" in sys.argv else ""


def main() -> None:
    with contextlib.ExitStack() as stack, announce_errors(words_about):
        stack.callback(clean_up)
        work()


run_main(main)
