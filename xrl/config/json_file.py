"""JSON files that users hand over: one reader, for the checks before a run and for the run itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from xrl.config.errors import SettingsError


def read_json_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file of UTF-8 text, with or without a byte order mark.

    Raises:
        SettingsError: it cannot be read, or is something else.
    """
    try:
        content = json.loads(file.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise SettingsError(f"{file} cannot be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise SettingsError(f"{file}, line {error.lineno} is not JSON: {error.msg}") from error
    except RecursionError as error:
        raise SettingsError(f"{file} is not JSON that can be read: it nests too deeply") from error
    except ValueError as error:  # not UTF-8, or a number of thousands of digits
        raise SettingsError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{file} needs a JSON object, found a {type(content).__name__}")
    return content
