"""torchrun from inside `xrl train`: the same agent, without its noise."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from xrl.config import SettingsError
from xrl.launch.address import LOOPBACK
from xrl.launch.children import module_command
from xrl.launch.exit import EXIT_BAD_SETTINGS, EXIT_ERROR, EXIT_STOPPED, has_announced, prepare_agents_file
from xrl.launch.memory import set_large_pages
from xrl.launch.signals import STOP_SIGNALS, ignores_hang_up
from xrl.launch.start import without_collections
from xrl.launch.temporary import own_folder
from xrl.launch.terminal import say
from xrl.launch.threads import set_thread_waiting

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure


def run_ranks(arguments: Sequence[str], *, num_ranks: int, words_of_ranks: Callable[[Path], str]) -> int:
    """Run `xrl.train` on `num_ranks` ranks of this machine; returns the exit code.

    The ranks show the first error themselves. A rank that could not, such as one that a signal killed, is named here.

    Args:
        words_of_ranks: reads what the ranks have left to say in the file of `prepare_agents_file`; empty: nothing.
    """
    _prepare_process(num_ranks)
    # torch reads the environment, and is slow to import: only when ranks are started.
    with without_collections():
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.run import parse_args, run

    with contextlib.ExitStack() as stack:
        try:
            log_dir = stack.enter_context(own_folder())
            left_to_say = prepare_agents_file(log_dir)
        except OSError as error:
            raise SettingsError(f"a temporary folder is needed (TMPDIR): {error}") from error
        # Started by our own words: torchrun's `--module` puts the current folder on the import path.
        torchrun = [*_options(num_ranks, log_dir), "--no-python", *module_command("xrl.train"), *arguments]
        try:
            run(parse_args(torchrun))
        except ChildFailedError as error:
            if not has_announced(log_dir):
                say(f"error: {_first_end(error.failures)}")
            words = words_of_ranks(left_to_say)
            if words:
                say(f"ended {words}")
            codes = {end.exitcode for end in error.failures.values()}
            return next((code for code in (EXIT_BAD_SETTINGS, EXIT_STOPPED) if code in codes), EXIT_ERROR)
        except SignalException as stop:
            return _stopped(stop.sigval, words_of_ranks(left_to_say))
        except KeyboardInterrupt:
            return _stopped(signal.SIGINT, words_of_ranks(left_to_say))
    return 0


def _prepare_process(num_ranks: int) -> None:
    # torchrun logs every failure again, in its own words; whoever wants to read them sets its LOGLEVEL.
    if "LOGLEVEL" not in os.environ:
        logging.disable(logging.ERROR)
    # A shell starts background commands with SIGINT ignored, and Python leaves it at that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # torch labels its events with the host's full name: a look-up that may wait for a name server, or refuse the name.
    socket.getfqdn = lambda name="": name or socket.gethostname()
    # torch's C++ part warns of every connection that a failure breaks.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_ranks)))
    set_thread_waiting(os.environ)
    set_large_pages(os.environ)
    # After this many seconds a rank that was told to end is killed; by default 30.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "10")


def _options(num_ranks: int, log_dir: Path) -> list[str]:
    from torch.distributed.launcher.api import LaunchConfig

    options = [f"--nproc-per-node={num_ranks}", f"--log-dir={log_dir}"]
    # As `--standalone`, but by address: the host's name, and even `localhost`, may be known to nobody.
    options += ["--nnodes=1", "--rdzv-backend=c10d", f"--rdzv-id={uuid.uuid4()}"]
    options += [f"--rdzv-endpoint={LOOPBACK}:0", f"--local-addr={LOOPBACK}"]
    if any(field.name == "signals_to_handle" for field in dataclasses.fields(LaunchConfig)):
        # Ctrl-C reaches the ranks as SIGTERM: those that are still starting would each print a KeyboardInterrupt.
        options.append(f"--signals-to-handle=SIGTERM,{'' if ignores_hang_up() else 'SIGHUP,'}SIGQUIT")
    return options


def _first_end(failures: Mapping[int, ProcessFailure]) -> str:
    """How the first rank ended of itself; the others were stopped because of it."""
    stop_codes = {code for number in STOP_SIGNALS for code in (-number, 128 + number)}
    rank, failure = min(failures.items(), key=lambda item: (item[1].exitcode in stop_codes, item[1].timestamp))
    if failure.exitcode >= 0:
        return f"rank {rank} ended with exit code {failure.exitcode} and said nothing"
    name = signal.Signals(-failure.exitcode).name
    hint = ": the machine may have run out of memory" if name == "SIGKILL" else ""
    return f"rank {rank} was ended by {name}{hint}"


def _stopped(number: int, words: str) -> int:
    say(f"stopped by {signal.Signals(number).name} {words}".rstrip())
    return 128 + number
