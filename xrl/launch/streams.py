"""Standard streams that are there and stay there, whatever the parent did with them.

A daemon closes them, a pipe's reader such as `head` goes, a terminal is hung up, an old environment says ASCII. None of
that is a reason to fail: the exit code says how the work ended, not whether somebody read along. Only a command whose
output cannot be stored says so, at its end; a run has its results in files.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

STDIN, STDOUT, STDERR = range(3)


def prepare_streams() -> None:
    """Open what the parent closed on /dev/null, and let writing to a stream that nobody reads do nothing.

    Comes first: a file that is opened before would get the number of a closed stream, and what is printed would go into
    it. The descriptors are inherited by child processes.
    """
    for descriptor in (STDIN, STDOUT, STDERR):
        _open_where_closed(descriptor)
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115 - for as long as the process runs
    stdout = _Patient(STDOUT, "w", closefd=False)
    sys.stdout = _as_text(stdout, sys.stdout)
    sys.stderr = _as_text(_Patient(STDERR, "w", closefd=False), sys.stderr)
    atexit.register(_say_what_was_lost, stdout, sys.stdout)


class _Patient(io.FileIO):
    """A standard stream as bytes, without the errors of a reader that is gone."""

    lost: OSError | None = None  # why something could not be stored

    def write(self, data: ReadableBuffer) -> int:
        try:
            written = super().write(data)
        except BrokenPipeError:
            _point_at_nothing(self.fileno())
            written = None
        except OSError as error:  # a full disk below it, or a terminal that was hung up
            self.lost = error
            written = None
        return memoryview(data).nbytes if written is None else written


def _say_what_was_lost(stdout: _Patient, text: TextIO) -> None:
    text.flush()
    if stdout.lost is not None:
        print(f"xrl: error: standard output cannot be written to: {stdout.lost.strerror}", file=sys.stderr, flush=True)
        os._exit(1)


def _as_text(raw: _Patient, stream: TextIO | None) -> TextIO:
    """In the manner of `stream`, which it replaces."""
    if stream is not None:
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=getattr(stream, "encoding", None),
        # A name of a file that is not UTF-8, or an environment that knows ASCII only.
        errors="backslashreplace",
        line_buffering=raw.fileno() == STDERR or raw.isatty(),
        write_through=bool(getattr(stream, "write_through", False)),
    )


def _open_where_closed(descriptor: int) -> None:
    try:
        os.fstat(descriptor)
    except OSError:
        _point_at_nothing(descriptor)


def _point_at_nothing(descriptor: int) -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    if nothing == descriptor:
        os.set_inheritable(descriptor, True)
    else:
        os.dup2(nothing, descriptor)
        os.close(nothing)
