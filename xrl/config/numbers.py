"""Numbers as people and files write them, read the same way everywhere: ASCII digits, and only so many of them.

Python's own `int` and `float` take more (`1_000`, ` 5 `, digits of any script), and of thousands of digits, or of a
superscript that `str.isdigit` takes for a digit, they make an exception.
"""

from __future__ import annotations

import math
import re

from xrl.config.errors import SettingsError

# Four months: clocks and waits cannot count much further.
LONGEST_S = 10_000_000
# Of a whole number: those of 64 bits have no more.
_WHOLE = re.compile(r"-?[0-9]{1,19}")
_DECIMAL = re.compile(r"-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
# Of another: the largest one of 64 bits, written out, has 309.
_MOST_CHARS = 400


def check_at_most(flag: str, found: float, most: int) -> None:
    """Refuse a number that nothing could come of.

    Raises:
        SettingsError: `found` is more than `most`.
    """
    if found > most:
        raise SettingsError(f"{flag} must be at most {most:,}, got {found:g}")


def whole_number(text: str) -> int | None:
    """The whole number that `text` spells; None if it spells none, or one of more than 19 digits."""
    return int(text) if _WHOLE.fullmatch(text) else None


def decimal_number(text: str) -> float | None:
    """The finite number that `text` spells; None if it spells none."""
    number = float(text) if len(text) <= _MOST_CHARS and _DECIMAL.fullmatch(text) else math.inf
    return number if math.isfinite(number) else None


def numbered(name: str, prefix: str) -> int | None:
    """N of a name that we gave, such as `hf-N`; None for other names, such as that of a user's copy (`hf-07`)."""
    number = whole_number(name.removeprefix(prefix))
    return number if number is not None and number >= 0 and f"{prefix}{number}" == name else None
