"""`python forked_ranks.py`: runs scripts on ranks that are forked from this process, which has the libraries imported.

Importing torch and megatron-core takes a rank five seconds, more than most tests compute: here it is done once for all
scripts of a test session. Starting ranks with torchrun is what the tests in tests/e2e do.

What to run comes on standard input, as lines of JSON (`Order`); each is answered with two lines, the id of the process
that leads the ranks, at once, and its exit code. Ends with its standard input.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import sys
import traceback
from typing import TypedDict

from xrl.parallel.cpu import prepare_megatron_for_cpu

prepare_megatron_for_cpu()

import transformers  # noqa: E402

import xrl.session  # noqa: E402, F401

# Modules that transformers imports when they are asked for.
_ = transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast


class Order(TypedDict):
    """A script to run."""

    num_ranks: int  # 1: without torchrun's variables, as a world of its own
    words: list[str]  # the script and its arguments
    environment: dict[str, str]
    output: str  # file that gets what the ranks print
    errors: str


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_script(script: str, who: str) -> int:
    """Exit code of the script, run in this process."""
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(f"{who}: {end.code}", file=sys.stderr)
        return 1
    except BaseException:
        print(f"{who}:\n{traceback.format_exc()}", file=sys.stderr)
        return 1
    return 0


def leave(code: int) -> None:
    """End this fork, without what its parent wants done at its end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_ranks(script: str, num_ranks: int) -> int:
    """Exit code of the ranks, each forked from this process; the first that fails takes the others along."""
    port = free_port()
    ranks = []
    for rank in range(num_ranks):
        pid = os.fork()
        if not pid:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(num_ranks),
                "LOCAL_WORLD_SIZE": str(num_ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            leave(run_script(script, f"rank {rank}"))
        ranks.append(pid)
    while ranks:
        pid, status = os.wait()
        if pid not in ranks:
            continue
        ranks.remove(pid)
        if status:
            # The others may wait for it in a collective.
            for other in ranks:
                os.kill(other, signal.SIGKILL)
            return 1
    return 0


def obey(order: Order) -> int:
    """Exit code of what was ordered; in a fork of its own, and in a session of its own, which a time-out ends."""
    os.setsid()
    for descriptor, path in ((0, os.devnull), (1, order["output"]), (2, order["errors"])):
        file = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update(order["environment"])
    sys.argv = order["words"]
    script = order["words"][0]
    return run_ranks(script, order["num_ranks"]) if order["num_ranks"] > 1 else run_script(script, "the only rank")


def main() -> None:
    for line in sys.stdin.buffer:
        num_threads = len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 1
        assert num_threads == 1, f"{num_threads} threads: a fork has only one of them, and what the others locked"
        pid = os.fork()
        if not pid:
            leave(obey(json.loads(line)))
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
