"""`python forked_workers.py SOCKET`: rollout workers, forked from this process, which has their libraries imported.

Importing them takes a worker two seconds, more than most tests of a fleet compute: here it is done once for all tests
of a session. Workers that start as a user's do are in tests/e2e.

Each message on the socket (its descriptor is the argument) is an `Order` in JSON, with two descriptors: the worker's
standard output and its standard error. The answer is the worker's process id. Ends with the socket.

A worker's parent is not this process but who asked for it: the fork in the middle ends at once, and what it leaves
behind falls to the nearest process above that takes orphans, as whoever asks must do meanwhile.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
import traceback
from typing import TypedDict

import tests.rollout.scripted_engine  # noqa: F401
import xrl.rollout.embedded.engine
import xrl.rollout.worker

MOST_BYTES = 1 << 17


class Order(TypedDict):
    """A worker to start."""

    arguments: list[str]
    environment: dict[str, str]


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, MOST_BYTES, 2)
        if not message:
            return
        num_threads = len(os.listdir("/proc/self/task"))
        assert num_threads == 1, f"{num_threads} threads: a fork has only one of them, and what the others locked"
        number_end, number = os.pipe()
        middle = os.fork()
        if not middle:
            middle = os.getpid()
            worker = os.fork()
            if worker:
                os.write(number, str(worker).encode())
                os._exit(0)
            for descriptor in (number_end, number, control.detach()):
                os.close(descriptor)
            os._exit(become_worker(json.loads(message), descriptors, born_of=middle))
        os.waitpid(middle, 0)  # the worker has its parent now
        control.send(os.read(number_end, 32))
        for descriptor in (number_end, number, *descriptors):
            os.close(descriptor)


def become_worker(order: Order, descriptors: list[int], *, born_of: int) -> int:
    """Do what `python -m xrl.rollout.worker` does, in this fork, once its parent is the right one: its exit code."""
    while os.getppid() == born_of:
        time.sleep(0.001)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, descriptor in enumerate([nothing, *descriptors]):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(order["environment"])
    sys.argv[1:] = order["arguments"]
    try:
        xrl.rollout.worker.main()
    except SystemExit as end:
        assert isinstance(end.code, int)
        return end.code
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    main()
