"""How a rank ends: its error is shown once for the whole run, where it happened, and soon after it is gone."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from xrl.config.errors import SettingsError
from xrl.launch.address import on_one_host
from xrl.launch.hearing import Hearing, hearing
from xrl.launch.signals import GRACE_S, Stopped, end_after, ignore_signals, stop_with_parent
from xrl.launch.stop import EXIT_STOPPED, StopRequest
from xrl.launch.temporary import remove_abandoned
from xrl.launch.terminal import one_line, printable, quoted

EXIT_ERROR = 1
EXIT_BAD_SETTINGS = 2

# What collectives and the store say when another rank has gone: its end is the news, not ours.
_ECHO = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|store->|tcpstore", re.IGNORECASE)
# Time for torchrun to notice that end and to stop this rank before it speaks.
_ECHO_WAIT_S = 3.0
_MARKER = "xrl-first-error"
_AGENTS_FILE = "xrl-left-to-say"


class RunEnded(SystemExit):
    """The run ends itself, on every rank alike, as going on is of no use: exit code 1 and a sentence, no traceback."""

    def __init__(self, sentence: str = "", *, says_where: bool = False) -> None:
        """
        Args:
            sentence: why, on the rank that knows; the others have nothing to say.
            says_where: whether it names the run's folder and what is saved there.
        """
        super().__init__(EXIT_ERROR)
        self.sentence = sentence
        self.says_where = says_where


class RunHung(RunEnded):
    """A rank is stopped or hangs, and the others wait for it: exit code 75, and a sentence with a line a rank."""

    def __init__(self, sentence: str = "") -> None:
        """
        Args:
            sentence: the report; empty where another rank gives it.
        """
        super().__init__(sentence)
        self.code = EXIT_STOPPED


class RunStopped(SystemExit):
    """The run was asked to stop and has done so, on every rank alike: exit code 75 and a sentence."""

    def __init__(self, sentence: str = "", *, loses_nothing: bool = True) -> None:
        """
        Args:
            sentence: by what, how far it came and where its state is, on the rank that knows.
            loses_nothing: whether its state is saved, or there was nothing to save yet.
        """
        super().__init__(EXIT_STOPPED)
        self.sentence = sentence
        self.loses_nothing = loses_nothing


class RunFailed(RuntimeError):
    """Something outside this process, a rollout worker say, makes the run impossible: exit code 1, no traceback.

    Its words are all that there is to say: what, where, and what was found.
    """


def run_main(main: Callable[[], None], heard: Hearing | None = None) -> NoReturn:
    """Run a process's main function and exit.

    0, 2 for bad settings, 75 for a run that was asked to stop, 128 + n for signal n, 1 for any other error.

    Args:
        heard: hears this process's signals; default: each of them ends it at once.
    """
    with contextlib.ExitStack() as stack:
        if heard is None:
            stack.enter_context(hearing())
        if is_rank_of_torchrun():
            stop_with_parent(first=_tidy_up_after_agent)
        try:
            with announce_errors():
                main()
        except BaseException as error:
            exit_now(exit_code(error))
        exit_now(0)


def _no_words(error: BaseException) -> str:
    return ""


@contextlib.contextmanager
def announce_errors(
    words_about: Callable[[BaseException], str] = _no_words, stop: StopRequest | None = None
) -> Iterator[None]:
    """Show an error where it happens, before clean-up around this block starts, and give that clean-up GRACE_S.

    Of all ranks of a run only the first to fail speaks, and it speaks once, however many such blocks it leaves. A rank
    that is stopped by torchrun has no news but what `words_about` knows.

    Args:
        words_about: what is to be said beside an error: "after rollout 3 of 9; ...". Empty: nothing.
        stop: no longer makes a signal wait for the end of a step.
    """
    try:
        yield
    except BaseException as error:
        if not _was_announced(error):
            end = _outlived_echo(error, stop)
            ignore_signals()
            error.__dict__["xrl_announced"] = True
            end_after(GRACE_S, exit_code(error))
            message = describe(end, words_about(end))
            if message and (isinstance(end, Stopped) or _is_first()):
                print(printable(message), file=sys.stderr, flush=True)
        raise


def describe(error: BaseException, words: str = "") -> str:
    """What a user reads about the end of a process; empty where there is nothing to say.

    Args:
        words: how far the run came, and what is left of it.
    """
    words = one_line(words)
    if isinstance(error, SettingsError):
        return f"xrl: error: {error}"
    if isinstance(error, Stopped):
        # torchrun's ranks are stopped by torchrun, which was stopped itself or saw another rank fail.
        silent = is_rank_of_torchrun() and not words
        return "" if silent else f"xrl: stopped by {error.signal.name} {words}".rstrip()
    if isinstance(error, RunEnded | RunFailed):
        sentence = error.sentence if isinstance(error, RunEnded) else str(error)
        message = f"xrl: error: {quoted(sentence)}" if sentence else ""
        return f"{message}\nxrl: ended {words}" if message and words else message
    if isinstance(error, RunStopped):
        return f"xrl: {one_line(error.sentence)}" if error.sentence else ""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, str) else ""
    first_line = (str(error).splitlines() or [""])[0]
    summary = one_line(f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__)
    rank = f"{_rank_in_words()}: " if is_rank_of_torchrun() else ""
    # What an exception quotes may have line breaks in it: none of its lines shall be taken for one of ours.
    trace = re.sub("^(?=xrl: )", "  ", "".join(traceback.format_exception(error)), flags=re.MULTILINE)
    message = f"{trace}xrl: error: {rank}{summary}"
    return f"{message}\nxrl: ended {words}" if words else message


def _rank_in_words() -> str:
    """This rank of torchrun's; with its host, where there are several."""
    rank = f"rank {os.environ['RANK']}"
    return rank if on_one_host(os.environ) else f"{rank} on {socket.gethostname()}"


def announce_end(error: BaseException, words: str = "") -> None:
    """Say why this process is about to end, as `announce_errors` does, from any thread: its main thread is stuck.

    Args:
        words: as `describe` takes them.
    """
    message = describe(error, words)
    if message and _is_first():
        print(printable(message), file=sys.stderr, flush=True)


def exit_code(error: BaseException) -> int:
    """The exit code of a process that ends with `error`."""
    if isinstance(error, SettingsError):
        return EXIT_BAD_SETTINGS
    if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
        return error.code or 0
    return EXIT_ERROR


def is_rank_of_torchrun() -> bool:
    """Whether torchrun's agent started this process, and ends it."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


def has_announced(log_dir: Path) -> bool:
    """Whether a rank of a finished torchrun with this `--log-dir` has shown an error."""
    return any(log_dir.rglob(_MARKER))


def prepare_agents_file(log_dir: Path) -> Path:
    """In a torchrun's `--log-dir`: where its ranks shall leave what is to be said when they have ended."""
    file = log_dir / _AGENTS_FILE
    file.touch()
    return file


def agents_file() -> Path | None:
    """The file that `xrl train` above this rank has prepared; None alone or under plain torchrun."""
    run_dir = _run_dir()
    file = run_dir.parents[1] / _AGENTS_FILE if run_dir is not None else None
    return file if file is not None and file.exists() else None


def _tidy_up_after_agent() -> None:
    """`xrl train` above this rank was killed: what it would have removed."""
    file = agents_file()
    if file is not None:
        remove_abandoned(file.parent)


def _outlived_echo(error: BaseException, stop: StopRequest | None) -> BaseException:
    """What ended this rank: where that is another rank's end, wait for torchrun to say so by its signal."""
    if stop is not None:
        stop.fails = True
    is_news = isinstance(error, RunFailed)  # a worker's broken connection is no rank's
    is_echo = isinstance(error, RuntimeError | OSError) and not is_news and _ECHO.search(str(error))
    if is_rank_of_torchrun() and (is_echo or (isinstance(error, RunEnded) and not error.sentence)):
        if stop is not None and stop.signal is not None:  # it has said so already
            return Stopped(stop.signal)
        try:
            time.sleep(_ECHO_WAIT_S)
        except Stopped as stopped:
            return stopped
    return error


def _was_announced(error: BaseException | None) -> bool:
    """Whether this error, or one that was being cleaned up after when it was raised, has been shown."""
    while error is not None:
        if "xrl_announced" in error.__dict__:
            return True
        error = error.__context__
    return False


def _is_first() -> bool:
    """Whether no other rank of the run has spoken; from now on, one has."""
    run_dir = _run_dir()
    if run_dir is None:
        return True
    try:
        (run_dir / _MARKER).touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:  # a full disk, say: twice is better than never
        return True
    return True


def _run_dir() -> Path | None:
    """torchrun's folder for all ranks of this host in this run; None for a process that torchrun did not start."""
    # torchrun gives each rank <log dir>/<run>/attempt_<n>/<rank>/error.json.
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(error_file).parent.parent if is_rank_of_torchrun() and error_file else None


def exit_now(code: int) -> NoReturn:
    """End this process here and now, from any thread, without waiting for threads that other libraries left running."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
