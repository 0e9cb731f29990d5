"""Rows of a prompt file (JSONL or parquet), checked, with errors that name file and line.

A row holds `prompt` (chat messages, or a string) and `reward_model.ground_truth` (or a top-level
`ground_truth`); `data_source` and `extra_info` may be there too.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xrl.config import SettingsError
from xrl.data.table import read_table
from xrl.data.text import check_text, numbered_lines, parse_json_object

JSON_SUFFIXES = (".jsonl", ".json")
PARQUET_SUFFIXES = (".parquet",)
# What is read of a row; other columns of a table may be of any kind and size.
COLUMNS = ("prompt", "reward_model", "ground_truth", "data_source", "extra_info")


@dataclass(frozen=True, kw_only=True)
class PromptRow:
    """One row, before its tokens."""

    id: int  # row number in the file, from 0; blank lines do not count
    location: str  # where it stands, for messages: "line 3" of JSON lines, "row 3" of parquet
    prompt: str | list[dict[str, Any]]
    ground_truth: str
    data_source: str
    extra: Mapping[str, Any]  # for judges of the user's own, as the file has it; nothing of ours writes it


def check_dataset(
    path: Path, *, min_rows: int, what: str = "--data", see: Callable[[str, PromptRow], None] | None = None
) -> int:
    """Read the whole file without torch and return its number of rows.

    Args:
        min_rows: rows that one batch needs.
        what: the flag that named the file.
        see: is given each row, with the location that names it, and may refuse it.

    Raises:
        SettingsError: the file is missing, empty, too small, not JSON or not parquet, or one of its rows is wrong.
    """
    _check_file(path, what)
    num_rows = 0
    for row in _read_rows(path):
        if see is not None:
            see(f"{path}, {row.location}", row)
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
        SettingsError: as `check_dataset` does, but for the number of rows.
    """
    _check_file(path, what)
    rows = list(_read_rows(path))
    if not rows:
        raise SettingsError(f"{what} {path} is empty: it needs one prompt a line")
    return rows


def _check_file(path: Path, what: str) -> None:
    if not path.exists():
        raise SettingsError(f"{what} {path} does not exist")
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "is not a file"
        raise SettingsError(f"{what} {path} {problem}: give a JSONL or parquet file")
    if path.suffix not in JSON_SUFFIXES + PARQUET_SUFFIXES:
        known = ", ".join(JSON_SUFFIXES + PARQUET_SUFFIXES)
        raise SettingsError(f"{what} {path} must end in one of {known}, got {path.suffix or 'no ending'!r}")


def _read_rows(path: Path) -> Iterator[PromptRow]:
    """The rows, one by one: what is checked before a run is what the run is given."""
    rows = _parquet_rows(path) if path.suffix in PARQUET_SUFFIXES else _json_rows(path)
    try:
        with contextlib.closing(rows):  # at a bad row the process that reads a table ends at once
            for row_id, (location, row) in enumerate(rows):
                yield _parse_row(row, row_id, path, location)
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror or error}") from error


def _json_rows(path: Path) -> Generator[tuple[str, dict[str, Any]], None, None]:
    for number, line in numbered_lines(path):
        try:
            yield f"line {number}", parse_json_object(line)
        except ValueError as error:
            raise SettingsError(f"{path}, line {number} is {error}; each line must be one JSON object") from error


def _parquet_rows(path: Path) -> Generator[tuple[str, dict[str, Any]], None, None]:
    try:
        for number, row in enumerate(read_table(path, COLUMNS), start=1):
            yield f"row {number}", row
    except ValueError as error:
        raise SettingsError(f"{path} {error}") from error


def _parse_row(row: Mapping[str, Any], row_id: int, path: Path, location: str) -> PromptRow:
    where = f"{path}, {location}"
    for name in COLUMNS:
        try:
            check_text(row.get(name))
        except ValueError as error:
            raise SettingsError(f"{where}: `{name}` has {error}") from error
    return PromptRow(
        id=row_id,
        location=location,
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
