"""What others wrote, a model's answer say, on a person's terminal: as text, never as commands to the terminal."""

from __future__ import annotations

import re
import sys
import traceback
from types import TracebackType

# Control characters but for tab and newline (ESC begins a terminal's commands, CR lets one line hide another), and
# those that turn the direction of what follows.
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
# What ends a line or a column somewhere, beyond those.
_LINE_ENDS = re.compile("[\t\n\u2028\u2029]")


def printable(text: str) -> str:
    """The text with every character that a terminal would obey written as its escape, `\\x1b` for ESC."""
    return _COMMANDS.sub(_escape, text)


def one_line(text: str) -> str:
    """The text as a part of one line: printable, and what ends a line written as its escape too."""
    return _LINE_ENDS.sub(_escape, printable(text))


def say(message: str) -> None:
    """One message of ours to stderr, at once."""
    print(printable(f"xrl: {message}"), file=sys.stderr, flush=True)


def show_uncaught_printable() -> None:
    """From now on the traceback of an exception that nobody catches is printable as well."""
    sys.excepthook = _show


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(printable("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr, flush=True)


def _escape(found: re.Match[str]) -> str:
    code = ord(found.group())
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
