"""Rows of a prompt file (JSONL or parquet), checked, with errors that name file and place.

A row holds `prompt` (chat messages, or a string) and `reward_model.ground_truth` (or a top-level
`ground_truth`); `data_source` and `extra_info` may be there too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xrl.config import SettingsError
from xrl.data.table import read_table

JSON_SUFFIXES = (".jsonl", ".json")
PARQUET_SUFFIXES = (".parquet",)


@dataclass(frozen=True, kw_only=True)
class PromptRow:
    """One row, before its tokens."""

    id: int  # row number in the file, from 0; blank lines do not count
    prompt: str | list[dict[str, Any]]
    ground_truth: str
    data_source: str
    extra: Mapping[str, Any]


def check_dataset(
    path: Path, *, min_rows: int, what: str = "--data", see: Callable[[str, PromptRow], None] | None = None
) -> int:
    """Read the whole file without torch and return its number of rows.

    Args:
        min_rows: rows that one batch needs.
        what: the flag that named the file.
        see: is given each row, with the place that names it, and may refuse it.

    Raises:
        SettingsError: the file is missing, empty, too small, not JSON or not parquet, or one of its rows is wrong.
    """
    _check_file(path, what)
    num_rows = 0
    for place, row in _parquet_rows(path) if path.suffix in PARQUET_SUFFIXES else _json_rows(path):
        parsed = _parse_row(row, num_rows, f"{path}, {place}")
        if see is not None:
            see(f"{path}, {place}", parsed)
        num_rows += 1
    if num_rows == 0:
        raise SettingsError(f"{what} {path} is empty: it needs one prompt a line")
    if num_rows < min_rows:
        raise SettingsError(
            f"{what} {path} has {num_rows} rows, fewer than one batch of {min_rows}: "
            f"give more rows or use --rollout-batch-size {num_rows} or less"
        )
    return num_rows


def load_rows(path: Path, *, what: str = "--data") -> list[PromptRow]:
    """Every row of a JSONL or parquet file, in file order.

    Raises:
        SettingsError: as `check_dataset` does.
    """
    # `datasets` says neither which line is not JSON nor what a row lacks, so the file is checked before it is loaded.
    check_dataset(path, min_rows=1, what=what)
    is_parquet = path.suffix in PARQUET_SUFFIXES
    try:
        # JSON as lines of text: as one table, values would be changed to fit their column ("2020-01-01" to a date).
        rows = read_table("parquet" if is_parquet else "text", path)
    except ValueError as error:
        raise SettingsError(f"{what} {path} cannot be read: {error}") from error
    if not is_parquet:
        rows = [parse_json_object(row["text"]) for row in rows if row["text"].strip()]
    return [_parse_row(row, number, f"{path}, row {number + 1}") for number, row in enumerate(rows)]


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers from 1."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def parse_json_object(line: bytes | str) -> dict[str, Any]:
    """One JSONL line as a dictionary.

    Raises:
        ValueError: what is wrong with it, as the end of a sentence.
    """
    try:
        row = json.loads(line)
    except ValueError as error:  # malformed JSON, or bytes that are not UTF-8
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__}, not an object")
    return row


def _check_file(path: Path, what: str) -> None:
    if not path.exists():
        raise SettingsError(f"{what} {path} does not exist")
    if not path.is_file():
        raise SettingsError(f"{what} {path} is a folder: give a JSONL or parquet file")
    if path.suffix not in JSON_SUFFIXES + PARQUET_SUFFIXES:
        known = ", ".join(JSON_SUFFIXES + PARQUET_SUFFIXES)
        raise SettingsError(f"{what} {path} must end in one of {known}, got {path.suffix or 'no ending'!r}")


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in numbered_lines(path):
        try:
            yield f"line {number}", parse_json_object(line)
        except ValueError as error:
            raise SettingsError(f"{path}, line {number} is {error}; each line must be one JSON object") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    # Imported here: pyarrow takes a while, and most data is JSONL.
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise SettingsError(f"{path} is not a parquet file: {error}") from error
    number = 0
    with file:
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row


def _parse_row(row: Mapping[str, Any], row_id: int, where: str) -> PromptRow:
    return PromptRow(
        id=row_id,
        prompt=_parse_prompt(row.get("prompt"), where),
        ground_truth=_parse_ground_truth(row, where),
        data_source=str(row.get("data_source") or ""),
        extra=_parse_extra(row.get("extra_info"), where),
    )


def _parse_prompt(prompt: object, where: str) -> str | list[dict[str, Any]]:
    if prompt is None or prompt in ("", []):
        raise SettingsError(f"{where} has no `prompt`: give a string or a list of chat messages")
    if isinstance(prompt, str):
        return prompt
    is_chat = isinstance(prompt, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in prompt
    )
    if not is_chat:
        raise SettingsError(
            f"{where} has a `prompt` that is neither a string nor a list of chat messages with `role` and `content`"
        )
    messages: list[dict[str, Any]] = prompt  # type: ignore[assignment]
    return messages


def _parse_extra(extra: object, where: str) -> Mapping[str, Any]:
    if extra is None:
        return {}
    if not isinstance(extra, Mapping):
        raise SettingsError(f"{where} has an `extra_info` that is not an object: {repr(extra)[:60]}")
    return extra


def _parse_ground_truth(row: Mapping[str, Any], where: str) -> str:
    reward_model = row.get("reward_model")
    found = reward_model.get("ground_truth") if isinstance(reward_model, Mapping) else None
    if found is None:
        found = row.get("ground_truth")
    if found is None or (isinstance(found, str) and not found.strip()):
        raise SettingsError(f"{where} has no ground truth: give `reward_model.ground_truth` or `ground_truth`")
    if isinstance(found, bool) or not isinstance(found, str | int | float):
        raise SettingsError(f"{where} has a ground truth that is neither a string nor a number: {repr(found)[:60]}")
    if isinstance(found, float) and not math.isfinite(found):
        raise SettingsError(f"{where} has the ground truth {found}, which no answer equals: give a finite number")
    return str(found)
