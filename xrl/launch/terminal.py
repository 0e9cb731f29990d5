"""Our messages on a person's terminal: text of others in them is text (xrl/config/printable.py), never a command."""

from __future__ import annotations

import logging
import numbers
import sys
import traceback
from types import TracebackType
from typing import Any

from xrl.config.printable import one_line, printable

__all__ = ["one_line", "printable", "quoted", "say", "show_foreign_text_printable"]


def quoted(text: str) -> str:
    """Text that quotes others on one line; of line breaks those that indent what follows are kept: a log's tail."""
    return "\n  ".join(one_line(part) for part in text.split("\n  "))


def say(message: str) -> None:
    """One message of ours to stderr, at once, on one line."""
    print(f"xrl: {one_line(message)}", file=sys.stderr, flush=True)


def show_foreign_text_printable() -> None:
    """From now on the traceback of an exception that nobody catches is printable, and so is what is logged, by our own
    loggers and by those of libraries: they quote keys and names of files."""
    sys.excepthook = _show
    logging.setLogRecordFactory(PrintableRecord)


class PrintableRecord(logging.LogRecord):
    """A record whose values are quoted, so that none of them can be a line of its own."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        if self.exc_info and self.exc_info[0] is not None:
            # A formatter takes this text instead of making its own.
            self.exc_text = printable("".join(traceback.format_exception(*self.exc_info))).rstrip("\n")

    def getMessage(self) -> str:
        try:
            if isinstance(self.args, tuple) and self.args:
                return printable(str(self.msg) % tuple(_quoted(value) for value in self.args))
        except (TypeError, ValueError):  # a library that formats something of its own kind as a number
            pass
        return printable(super().getMessage())


def _quoted(value: Any) -> Any:
    """Numbers as they are, for `%d`."""
    return value if isinstance(value, numbers.Number) else quoted(str(value))


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(printable("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr, flush=True)
