"""How processes of a run start others that run Python."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from xrl.launch.import_path import runs_from
from xrl.launch.variables import drop_rank_variables


def module_command(module: str, *, python: Path | None = None) -> list[str]:
    """The words that run `module` as a program.

    Unbuffered (`-u`), so that what a library prints is in the log at once, and without the current folder on the import
    path (`-P`), unless xrl itself is run from there.

    Args:
        python: interpreter of another environment; left out: this one.
    """
    safe = [] if runs_from(os.getcwd()) else ["-P"]
    return [str(python or sys.executable), "-u", *safe, "-m", module]


def child_environment() -> dict[str, str]:
    """This process's environment for a child that is no rank: it must not believe that it is one."""
    environment = dict(os.environ)
    drop_rank_variables(environment)
    return environment
