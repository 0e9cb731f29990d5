"""JSON lines, and what text must be like before it goes to a tokenizer or into a file."""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from xrl.config import SettingsError
from xrl.config.files import open_regular
from xrl.config.json_file import MAX_DEPTH, NestedTooDeeply, parse_json

# Of a line, its newline included: a file of one line without end would fill the memory.
MAX_LINE_BYTES = 64 * 2**20
_SURROGATE = re.compile("[\ud800-\udfff]")


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers from 1. Only a newline ends a line, and byte order marks are cut.

    Raises:
        SettingsError: it is no file that can be read, or a line of it is too long.
    """
    with open_regular(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), start=1):
            if len(line) == MAX_LINE_BYTES:
                raise SettingsError(f"{path}, line {number} is longer than {MAX_LINE_BYTES:,} bytes")
            line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield number, line


def parse_json_object(line: bytes) -> dict[str, Any]:
    """One JSONL line as a dictionary.

    Raises:
        ValueError: what is wrong with it, as the end of a sentence.
    """
    try:
        row = parse_json(line)
    except NestedTooDeeply as error:
        raise ValueError("nested too deeply to be read") from error
    except ValueError as error:  # malformed, not UTF-8, a key twice, or a number of thousands of digits
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__}, not an object")
    return row


def check_text(value: object, *, depth: int = 0) -> None:
    """Refuse half characters, which JSON can spell (`\\ud83d`) but UTF-8 and tokenizers cannot, and values too deep.

    Args:
        value: text, or lists and objects with text in them.

    Raises:
        ValueError: what is wrong with it, as the object of a sentence.
    """
    if depth > MAX_DEPTH:
        raise ValueError(f"values nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, str):
        found = _SURROGATE.search(value)
        if found:
            raise ValueError(f"\\u{ord(found[0]):04x}, half of a character: the other half is missing beside it")
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            check_text(name, depth=depth + 1)
            check_text(inner, depth=depth + 1)
    elif isinstance(value, list | tuple):
        for inner in value:
            check_text(inner, depth=depth + 1)
