"""Finds where in a user's own file an error was raised, for the line that reports it."""

from __future__ import annotations

import inspect
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from types import CodeType

_OURS = Path(__file__).resolve().parents[1]


def words_of(error: BaseException) -> str:
    """The first line of an exception's message that is not blank. Never raises."""
    try:
        return next((line for line in str(error).splitlines() if line.strip()), "")
    except BaseException:  # an exception of the user's own, with a __str__ of their own
        return "(its message cannot be shown)"


def shown(value: object) -> str:
    """What Python prints of a value. Never raises."""
    try:
        return repr(value)
    except BaseException:  # a type of the user's own, an integer of more than 4,300 digits
        return f"a {type(value).__name__} that cannot be shown"


def location_raised(error: BaseException) -> str:
    """Where the user's own code raised it, or called a package that did; empty for errors in our own code."""
    if isinstance(error, SyntaxError) and error.filename:
        return ""  # its message names the location
    frames = [(frame.f_code, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    others = [(code, line) for code, line in frames if not _is_below(code, [_OURS])]
    own = [(code, line) for code, line in others if not _is_below(code, _library_folders())]
    if not own and (not others or len(frames) - len(others) > 1):
        return ""  # a judge of ours, failing in a library
    code, line = own[-1] if own else others[0]
    function = "" if code.co_name == "<module>" else f", in {code.co_name}"
    return f"{_shown(code)}, line {line}{function}"


def location_of(function: Callable[..., object]) -> str:
    """Where a function is written; empty where Python does not know."""
    try:
        inner = inspect.unwrap(function)
        code = getattr(inner, "__code__", None) or getattr(type(inner).__call__, "__code__", None)
    except (ValueError, AttributeError):
        return ""
    if code is None or _is_below(code, [_OURS]):
        return ""
    return f"{_shown(code)}, line {code.co_firstlineno}, in {code.co_name}"


def _is_below(code: CodeType, folders: list[Path]) -> bool:
    """Whether code is from one of the folders, or from no file at all."""
    file = Path(code.co_filename)
    return code.co_filename.startswith("<") or any(file.is_relative_to(folder) for folder in folders)


def _library_folders() -> list[Path]:
    return [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")]


def _shown(code: CodeType) -> str:
    """A file as the user would name it from where they are."""
    file = Path(code.co_filename)
    try:
        return str(file.relative_to(Path.cwd()))
    except (ValueError, OSError):  # it is elsewhere, or the folder is gone
        return str(file)
