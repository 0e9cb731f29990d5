"""The command that a user typed, as far as its processes know it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import psutil

from xrl.launch.exit import is_rank_of_torchrun

# Options of Python that take the next word.
_WITH_VALUE = ("-X", "-W")
# What a command is called whose Python code is started by another name.
_SCRIPTS = {"xrl.cli": "xrl"}


def typed_command() -> list[str]:
    """The words of the command that started this run: for a rank of torchrun, those of the process above it."""
    if is_rank_of_torchrun():
        try:
            return readable_command(psutil.Process().parent().cmdline())  # type: ignore[union-attr]
        except (AttributeError, psutil.Error):  # it is gone, or somebody else's
            pass
    return readable_command(sys.orig_argv)


def readable_command(words: Sequence[str]) -> list[str]:
    """Leave out the interpreter, its options and the script's folder, if it is a script that users type.

    `/env/bin/python -P /env/bin/xrl train --lr 1` -> `xrl train --lr 1`, and so for `python -m xrl.cli train --lr 1`.
    """
    index = 1
    while index < len(words) and words[index].startswith("-") and words[index] not in ("-m", "-c"):
        index += 2 if words[index] in _WITH_VALUE else 1
    if words[index : index + 1] == ["-m"] and index + 1 < len(words):
        module, rest = words[index + 1], list(words[index + 2 :])
        return [_SCRIPTS[module], *rest] if module in _SCRIPTS else ["python", "-m", module, *rest]
    if index < len(words) and words[index] != "-c":
        script, rest = Path(words[index]), list(words[index + 1 :])
        # Scripts of an environment have no ending, and are typed by their name.
        return [script.name, *rest] if not script.suffix else ["python", str(script), *rest]
    return list(words)
