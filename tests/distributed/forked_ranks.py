"""`python forked_ranks.py N SCRIPT ...`: N ranks of a script, forked from one process with the libraries imported.

Importing torch and megatron-core takes a rank five seconds, more than most tests compute: here it is done once.
Starting ranks with torchrun is what the tests in tests/e2e do.
"""

from __future__ import annotations

import os
import runpy
import signal
import socket
import sys
import traceback

from xrl.parallel.cpu import prepare_megatron_for_cpu

prepare_megatron_for_cpu()

import xrl.assembly  # noqa: E402
import xrl.trainer  # noqa: E402, F401


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_rank(rank: int, num_ranks: int, port: int, script: str) -> int:
    """Exit code of the script."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(f"rank {rank}: {end.code}", file=sys.stderr)
        return 1
    except BaseException:
        print(f"rank {rank}:\n{traceback.format_exc()}", file=sys.stderr)
        return 1
    return 0


def main() -> None:
    num_ranks, script = int(sys.argv[1]), sys.argv[2]
    sys.argv = sys.argv[2:]
    port = free_port()
    ranks = []
    for rank in range(num_ranks):
        pid = os.fork()
        if not pid:
            code = run_rank(rank, num_ranks, port, script)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
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
            sys.exit(1)


if __name__ == "__main__":
    main()
