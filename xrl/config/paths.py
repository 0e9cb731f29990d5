"""Settings that mean the same in every folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from xrl.config.settings import Settings


def absolute_paths(settings: Settings) -> Settings:
    """The same settings with every relative path written out: that of a judge's file too.

    Modules (`package.module:function`) stay as they are: where they are found is Python's business.
    """
    sections = {
        section.name: _absolute_section(getattr(settings, section.name)) for section in dataclasses.fields(settings)
    }
    return dataclasses.replace(settings, **sections)


def _absolute_section(section: Any) -> Any:
    values = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    return dataclasses.replace(section, **{name: _absolute(value) for name, value in values.items()})


def _absolute(value: Any) -> Any:
    if isinstance(value, Path):
        return value.absolute()  # not resolved: an interpreter of a virtual environment is a link
    if isinstance(value, str):
        source, colon, name = value.rpartition(":")
        if colon and name and source.endswith(".py"):
            return f"{Path(source).expanduser().absolute()}:{name}"
    return value
