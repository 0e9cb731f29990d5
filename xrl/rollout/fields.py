"""Fields of a JSON object that somebody else wrote: each of the type and in the range that it must have."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

INT64 = range(-(2**63), 2**63)
# Of a value, in an error.
MAX_SHOWN = 60


def object_from_json(text: bytes, what: str) -> dict[str, Any]:
    """The JSON object that a text holds.

    Raises:
        ValueError: it is none, it is nested without end, or it holds NaN or infinity.
    """
    try:
        found = json.loads(text.decode(), parse_constant=_no_number)
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{what} must be JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{what} must be a JSON object, found {shown(found)}")
    return found


def text_of(body: Mapping[str, Any], name: str, *, longest: int, default: str | None = None) -> str:
    """A text that can be printed, of 1 to `longest` characters.

    Raises:
        ValueError: it is none; as for all fields here, it names the field and what was found.
    """
    value = body.get(name, default)
    if not isinstance(value, str) or not 1 <= len(value) <= longest or not value.isprintable():
        raise ValueError(f"{name} must be a text of 1 to {longest} printable characters, found {shown(value)}")
    return value


def int_of(body: Mapping[str, Any], name: str, *, within: range, default: int | None = None) -> int:
    """A whole number in a range. Raises as `text_of`."""
    value = body.get(name, default)
    if type(value) is not int or value not in within:
        raise ValueError(f"{name} must be a whole number in [{within.start}, {within.stop - 1}], found {shown(value)}")
    return value


def float_of(body: Mapping[str, Any], name: str, *, low: float, high: float, default: float | None = None) -> float:
    """A number in [low, high]. Raises as `text_of`."""
    value = body.get(name, default)
    if type(value) not in (int, float) or not low <= value <= high or not math.isfinite(value):
        raise ValueError(f"{name} must be a number in [{low:g}, {high:g}], found {shown(value)}")
    return float(value)


def ints_of(value: Any, name: str, *, most: int, within: range) -> list[int]:
    """A list of whole numbers in a range. Raises as `text_of`."""
    if not isinstance(value, list) or len(value) > most:
        raise ValueError(f"{name} must be a list of at most {most} whole numbers, found {shown(value)}")
    # One pass in C for each check: a prompt has many.
    if value and (set(map(type, value)) != {int} or min(value) not in within or max(value) not in within):
        raise ValueError(f"{name} must hold whole numbers in [{within.start}, {within.stop - 1}], found {shown(value)}")
    return value


def object_of(body: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A JSON object. Raises as `text_of`."""
    value = body.get(name)
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a JSON object, found {shown(value)}")
    return value


def shown(value: Any) -> str:
    """A value as an error shows it: its beginning, or how much there is of it."""
    if isinstance(value, list | dict) and len(value) > 8:
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    if isinstance(value, int) and value not in INT64:
        return f"a number of {value.bit_length()} bits"
    text = repr(value[:MAX_SHOWN] if isinstance(value, str) else value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON's")
