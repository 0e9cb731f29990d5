"""torchrun from inside `xrl train`: the same agent, without its noise."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path

from xrl.launch.exit import FIRST_ERROR_VARIABLE


def run_ranks(arguments: Sequence[str], *, num_ranks: int) -> int:
    """Run `xrl.train` on `num_ranks` ranks of this machine; returns the exit code.

    The ranks show the first error themselves. A rank that could not (killed by a signal, say) is named here.
    """
    # torchrun logs every failure again, in its own words.
    os.environ.setdefault("LOGLEVEL", "CRITICAL")
    cores = os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_ranks)))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    with tempfile.TemporaryDirectory(prefix="xrl-") as folder:
        marker = Path(folder) / "first-error"
        os.environ[FIRST_ERROR_VARIABLE] = str(marker)
        torchrun = ["--standalone", f"--nproc-per-node={num_ranks}", "--module", "xrl.train", *arguments]
        try:
            run(parse_args(torchrun))
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if not marker.exists():
                how = f"signal {-failure.exitcode}" if failure.exitcode < 0 else f"exit code {failure.exitcode}"
                print(f"xrl: error: rank {rank} ended with {how}", flush=True)
            return 1
        except SignalException as stop:
            return 128 + int(stop.sigval)
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
    return 0
