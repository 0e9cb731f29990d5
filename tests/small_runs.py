"""Flags and files of a small run, and the checks before it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from xrl.config.parse import parse_settings
from xrl.preflight import preflight


class Refusal(Protocol):
    """The sentence with which flags of a run are refused."""

    def __call__(self, *flags: str, world_size: int = 1) -> str: ...


def check(model: Path, data: Path, folder: Path, *flags: str, world_size: int = 1) -> None:
    """Parse and check a small run; `flags` come last and win."""
    preflight(parse_settings([*run_flags(model, data, folder), *flags]), world_size=world_size)


def run_flags(model: Path, data: Path, folder: Path) -> list[str]:
    """The flags of a small run that writes below `folder`."""
    return [
        *("--model", str(model)),
        *("--data", str(data)),
        *("--work-dir", str(folder / "work")),
        *("--rollout-batch-size", "4"),
        *("--samples-per-prompt", "2"),
        *("--max-prompt-length", "32"),
        *("--max-response-length", "32"),
    ]


def write_rows(file: Path, rows: list[Any]) -> Path:
    """One JSON value a line."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def edit_json(file: Path, **changes: Any) -> None:
    """Set fields of a JSON object in place."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
