"""JSON files that users hand over: one reader, for the checks before a run and for the run itself."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from xrl.config.errors import SettingsError
from xrl.config.files import read_whole
from xrl.config.printable import shown

# The largest tokenizers have 35 MB.
MOST_BYTES = 256 * 2**20
# Deeper values end Python's own functions that copy, compare or write them.
MAX_DEPTH = 100


class NestedTooDeeply(ValueError):
    """Brackets in brackets, more of them than there is a use for."""

    def __init__(self) -> None:
        super().__init__("it nests too deeply")


def read_json_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file of UTF-8 text, with or without a byte order mark.

    Raises:
        SettingsError: it cannot be read, is something else, or says what other readers would take otherwise: a key
            twice, or numbers that JSON does not have.
    """
    try:
        content = parse_json(read_whole(file, most_bytes=MOST_BYTES), refuse_constant=_no_constant)
        _check_depth(content)
    except json.JSONDecodeError as error:
        raise SettingsError(f"{file}, line {error.lineno} is not JSON: {error.msg}") from error
    except ValueError as error:  # not UTF-8, or a number of thousands of digits
        raise SettingsError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{file} needs a JSON object, found a {type(content).__name__}")
    return content


def parse_json(text: bytes, *, refuse_constant: Callable[[str], NoReturn] | None = None) -> Any:
    """Parse UTF-8 text as JSON.

    Args:
        refuse_constant: is given NaN, Infinity or -Infinity, which Python reads and others do not.

    Raises:
        ValueError: it is none that every reader understands alike.
    """
    try:
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=_without_twice, parse_constant=refuse_constant)
    except RecursionError as error:
        raise NestedTooDeeply from error


def _without_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {shown(twice)} is there twice")
    return found


def _no_constant(literal: str) -> NoReturn:
    raise ValueError(f"{literal} is no number of JSON's")


def _check_depth(value: Any) -> None:
    """Level by level, as a function that calls itself would need the depth that is looked for."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        if not level:
            return
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    raise NestedTooDeeply
