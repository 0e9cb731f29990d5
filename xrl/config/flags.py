"""The flags there are: one for each field of the sections, with its type, to check values one by one."""

from __future__ import annotations

import dataclasses
import os
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from xrl.config.errors import SettingsError
from xrl.config.names import NAMES, known_name
from xrl.config.numbers import decimal_number, whole_number
from xrl.config.printable import shown
from xrl.config.settings import Settings

_NEEDED = {int: "a whole number", float: "a number", str: "text", Path: "a path"}
# Counts and sizes: more of nothing fits into a machine, and what takes it further on counts in 32 bits here and there.
LARGEST_COUNT = 2**31 - 1
_ANY_SIZE = ("seed",)  # it has bounds of its own
_DIGITS = re.compile("-?[0-9]+")
_METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


@dataclass(frozen=True, kw_only=True)
class Flag:
    """One setting, as the command line and YAML see it."""

    option: str  # --like-this
    type: Any  # bool, int, float, str, Path
    choices: tuple[str, ...] = ()  # of a Literal
    is_optional: bool = False  # may be None
    is_required: bool = False
    default: Any = None

    @property
    def name(self) -> str:
        """The field's name: the key in YAML."""
        return self.option.removeprefix("--").replace("-", "_")

    @property
    def is_switch(self) -> bool:
        """On by being there: --flag, off by --no-flag."""
        return self.type is bool

    @property
    def needed(self) -> str:
        """What a value must be, in words."""
        needed = "true or false" if self.is_switch else _NEEDED[self.type]
        if self.choices:
            needed = f"one of {', '.join(self.choices)}"
        return f"{needed} (or null)" if self.is_optional else needed

    @property
    def values(self) -> str:
        """What a value may be, as `--help` shows it."""
        if self.name in NAMES:
            return NAMES[self.name].words
        return f"{{{','.join(self.choices)}}}" if self.choices else _METAVARS[self.type]

    def arguments(self, text: str, *, where: str) -> list[str]:
        """The command-line arguments that set this to `text`.

        Raises:
            SettingsError: `text` is not of this flag's type; `where` begins the sentence.
        """
        if self.is_optional and text.lower() in ("none", "null"):
            return [self.option, "None"]
        if not self._fits(text):
            too_large = self.type is int and _DIGITS.fullmatch(text) is not None and self.name not in _ANY_SIZE
            at_most = f" of at most {LARGEST_COUNT:,}" if too_large else ""
            raise SettingsError(f"{where} needs {self.needed}{at_most}, found {shown(text)}")
        if not self.is_switch:
            # One word: tyro would take a value that begins with a dash for the next flag.
            return [f"{self.option}={known_name(self.name, text)}"]
        is_on = text.lower() == "true"
        if self.is_optional:
            return [self.option, str(is_on)]
        return [self.option] if is_on else [f"--no-{self.option.removeprefix('--')}"]

    def _fits(self, text: str) -> bool:
        if self.choices:
            return text in self.choices
        if self.is_switch:
            return text.lower() in ("true", "false")
        if self.type is int:
            number = whole_number(text)
            return number is not None and (self.name in _ANY_SIZE or abs(number) <= LARGEST_COUNT)
        if self.type is float:
            return decimal_number(text) is not None
        return bool(text) and _may_be_a_name(text)


def _may_be_a_name(text: str) -> bool:
    """Whether the system would take it as one: YAML can spell characters that a command line cannot."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _flag(field: dataclasses.Field[Any], annotation: Any) -> Flag:
    options = [annotation]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        options = [option for option in typing.get_args(annotation) if option is not type(None)]
    (kind,) = options
    choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
    return Flag(
        option=f"--{field.name.replace('_', '-')}",
        type=str if choices else kind,
        choices=choices,
        is_optional=kind is not annotation,
        is_required=field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING,
        default=None if field.default is dataclasses.MISSING else field.default,
    )


def _all_flags() -> Mapping[str, Flag]:
    flags: dict[str, Flag] = {}
    for section in typing.get_type_hints(Settings).values():
        hints = typing.get_type_hints(section)
        for field in dataclasses.fields(section):
            assert field.name not in flags, f"two sections have a setting named {field.name}"
            flags[field.name] = _flag(field, hints[field.name])
    return MappingProxyType(flags)


# Field name -> flag.
FLAGS = _all_flags()
