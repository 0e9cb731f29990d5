"""How a rank ends: its error is shown once for the whole run, and it never outlives its welcome.

A rank that waits in a collective runs no Python signal handler, and a rank whose peer died may wait for minutes. So a
watchdog thread is told of signals by the kernel's own hand, and ends the process when the main thread does not.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from xrl.config.errors import SettingsError

# From a signal or an error to the end of the process, clean-up (rollout workers!) included.
GRACE_S = 8.0
# A launcher sets it to a path for its run: the first rank that fails creates the file, and only that one speaks.
FIRST_ERROR_VARIABLE = "XRL_FIRST_ERROR_FILE"

EXIT_BAD_SETTINGS = 2


def run_main(main: Callable[[], None]) -> NoReturn:
    """Run a rank's main function and exit: 0, 2 for bad settings, 128 + n for signal n, 1 for any other error."""
    _install_signal_handlers()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    try:
        with announce_errors():
            main()
    except SystemExit as stop:
        _exit(stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1)
    except KeyboardInterrupt:
        _exit(128 + signal.SIGINT)
    except SettingsError:
        _exit(EXIT_BAD_SETTINGS)
    except BaseException:
        _exit(1)
    _exit(0)


@contextlib.contextmanager
def announce_errors() -> Iterator[None]:
    """Show an error where it happens, before clean-up around this block starts, and give that clean-up GRACE_S."""
    try:
        yield
    except SystemExit:
        raise
    except KeyboardInterrupt:
        _speak_first("xrl: interrupted")
        _end_after(GRACE_S, 128 + signal.SIGINT)
        raise
    except SettingsError as error:
        _speak_first(f"xrl: error: {error}")
        _end_after(GRACE_S, EXIT_BAD_SETTINGS)
        raise
    except BaseException as error:
        rank = os.environ.get("RANK", "0")
        _speak_first("".join(traceback.format_exception(error)) + f"xrl: error: rank {rank}: {_summary(error)}")
        _end_after(GRACE_S, 1)
        raise


def first_error_file() -> Path | None:
    """The file that marks that a rank of this run has failed; None for a run of one process."""
    if FIRST_ERROR_VARIABLE in os.environ:
        return Path(os.environ[FIRST_ERROR_VARIABLE])
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    # One torchrun agent, one run: its process id with its start time never comes back.
    import psutil

    agent = psutil.Process(os.getppid())
    return Path(tempfile.gettempdir()) / f"xrl-first-error-{agent.pid}-{agent.create_time():.2f}"


_has_spoken = threading.Event()


def _speak_first(message: str) -> None:
    """Print unless this process or another rank of the run has printed an error already."""
    if _has_spoken.is_set():
        return
    _has_spoken.set()
    marker = first_error_file()
    if marker is not None:
        try:
            marker.touch(exist_ok=False)
        except OSError:
            return
    print(message, file=sys.stderr, flush=True)


def _summary(error: BaseException) -> str:
    first_line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__


def _exit(code: int) -> NoReturn:
    """Without waiting for threads that other libraries left running."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _end_after(seconds: float, code: int) -> None:
    timer = threading.Timer(seconds, os._exit, args=(code,))
    timer.daemon = True
    timer.start()


def _install_signal_handlers() -> None:
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    threading.Thread(target=_watch_signals, args=(read_end,), daemon=True).start()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _on_sigterm)


def _on_sigterm(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _watch_signals(read_end: int) -> None:
    """The byte that the C signal handler writes arrives here even while the main thread sits in a collective."""
    while True:
        number = os.read(read_end, 1)[0]
        if number in (signal.SIGINT, signal.SIGTERM):
            time.sleep(GRACE_S)
            os._exit(128 + number)


def _end_with_parent(parent_pid: int) -> None:
    """torchrun's agent was killed: nobody is left who would end this rank."""
    while os.getppid() == parent_pid:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)
