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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from xrl.config import SettingsError
from xrl.launch.address import LOOPBACK
from xrl.launch.children import module_command
from xrl.launch.exit import EXIT_BAD_SETTINGS, EXIT_ERROR, has_announced, prepare_agents_file
from xrl.launch.hearing import RUN_SIGNALS, Hearing, hearing, uninterrupted
from xrl.launch.memory import set_large_pages
from xrl.launch.signals import STOP_SIGNALS, Stopped, ignores_hang_up
from xrl.launch.start import without_collections
from xrl.launch.stop import EXIT_STOPPED, CauseFile, PassedOn
from xrl.launch.temporary import own_folder
from xrl.launch.terminal import say
from xrl.launch.threads import set_thread_waiting

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure


def run_ranks(
    arguments: Sequence[str],
    *,
    num_ranks: int,
    words_of_ranks: Callable[[Path], str],
    note_end_of_ranks: Callable[[Path, str, bool], None],
    heard: Hearing | None = None,
) -> int:
    """Run `xrl.train` on `num_ranks` ranks of this machine; returns the exit code.

    The ranks show the first error themselves. A rank that could not, such as one that a signal killed, is named here.

    Args:
        words_of_ranks: reads what the ranks have left to say in the file of `prepare_agents_file`; empty: nothing.
        note_end_of_ranks: writes down how they ended, where they could not: that file, a sentence, and whether it is
            news to them.
        heard: hears this process's signals; default: made here.
    """
    if heard is None:
        with hearing(RUN_SIGNALS) as heard:
            return run_ranks(
                arguments,
                num_ranks=num_ranks,
                words_of_ranks=words_of_ranks,
                note_end_of_ranks=note_end_of_ranks,
                heard=heard,
            )
    _prepare_process(num_ranks)
    # torch reads the environment, and is slow to import: only when ranks are started.
    with without_collections(), uninterrupted():
        import psutil
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.run import parse_args, run

    with contextlib.ExitStack() as stack:
        try:
            log_dir = stack.enter_context(own_folder())
            left_to_say = prepare_agents_file(log_dir)
        except OSError as error:
            raise SettingsError(f"a temporary folder is needed (TMPDIR): {error}") from error
        causes = CauseFile(log_dir)
        passed_on = PassedOn(
            partial(heard.end, within_s=None),  # torchrun gives the ranks TORCH_ELASTIC_SHUTDOWN_TIMEOUT
            lambda: [child.pid for child in psutil.Process().children()],
            causes,
            say,
        )
        stack.callback(passed_on.close)
        heard.react = passed_on.hear
        # Started by our own words: torchrun's `--module` puts the current folder on the import path.
        torchrun = [*_options(num_ranks, log_dir), "--no-python", *module_command("xrl.train"), *arguments]
        try:
            run(parse_args(torchrun))
        except ChildFailedError as error:
            if any(end.exitcode == EXIT_STOPPED for end in error.failures.values()):
                words = words_of_ranks(left_to_say)
                if not has_announced(log_dir):  # there was nothing to save yet
                    say(f"stopped by {causes.read() or 'a signal'} {words}".rstrip())
                elif words:  # it hangs, of which a rank has told
                    say(f"ended {words}")
                    note_end_of_ranks(left_to_say, "the run hung: see the report above this line", False)
                return EXIT_STOPPED
            sentence, is_news = _first_end(error.failures), not has_announced(log_dir)
            if is_news:
                say(f"error: {sentence}")
            words = words_of_ranks(left_to_say)
            if words:
                say(f"ended {words}")
            note_end_of_ranks(left_to_say, sentence, is_news)
            is_bad_input = any(end.exitcode == EXIT_BAD_SETTINGS for end in error.failures.values())
            return EXIT_BAD_SETTINGS if is_bad_input else EXIT_ERROR
        except Stopped as stop:
            return _stopped(stop.signal, words_of_ranks(left_to_say))
        except SignalException as stop:  # SIGQUIT
            return _stopped(stop.sigval, words_of_ranks(left_to_say))
    return 0


def _prepare_process(num_ranks: int) -> None:
    # torchrun logs every failure again, in its own words; whoever wants to read them sets its LOGLEVEL.
    if "LOGLEVEL" not in os.environ:
        logging.disable(logging.ERROR)
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
        # The others are ours (`PassedOn`); a SIGHUP that is ignored shall be.
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
