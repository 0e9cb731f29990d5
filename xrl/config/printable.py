"""What others wrote, as text: a model's answer, a file's key, an exception's words.

It is never a command to a terminal, and never a line of its own among ours.
"""

from __future__ import annotations

import re

# Control characters but for tab and newline (ESC begins a terminal's commands, CR lets one line hide another), other
# characters that begin a line, those that turn the direction of what follows, and halves of characters.
_COMMANDS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
_BREAKS = str.maketrans({"\n": "\\n", "\t": "\\t"})


def printable(text: str) -> str:
    """The text with every character that a terminal would obey written as its escape, `\\x1b` for ESC."""
    return _COMMANDS.sub(_escape, text)


def one_line(text: str) -> str:
    """`printable` for what is quoted in a line: line breaks and tabs are escapes, too."""
    return printable(text).translate(_BREAKS)


def shortened(text: str, most_chars: int) -> str:
    """The text, its middle left out where it is longer."""
    if len(text) <= most_chars:
        return text
    half = (most_chars - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"


def shown(value: object, most_chars: int = 100) -> str:
    """A value of a user's as Python writes it, for `found ...`; its middle left out where it is long."""
    return shortened(repr(value), most_chars)


def printable_json(line: str) -> str:
    """JSON text with the same characters as JSON's own escapes: it says the same, and can be shown as it is."""
    return _COMMANDS.sub(lambda found: f"\\u{ord(found.group()):04x}", line)


def _escape(found: re.Match[str]) -> str:
    code = ord(found.group())
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
