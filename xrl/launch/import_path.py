"""Where Python looks for modules: not in the folder that somebody happens to stand in.

A user's `queue.py` or `datasets/` there would be taken for the module of that name. PYTHONPATH holds as ever, and a
judge is looked for in the current folder last.
"""

from __future__ import annotations

import os
import sys

import xrl


def leave_current_folder() -> None:
    """Remove the current folder, which `python -m` put first on the path, unless xrl itself is run from there."""
    current = os.getcwd()
    if not sys.flags.safe_path and sys.path and sys.path[0] in ("", current) and not runs_from(current):
        del sys.path[0]


def runs_from(folder: str) -> bool:
    """Whether this very xrl lies in `folder`, such as a checkout that need not be installed."""
    return os.path.dirname(os.path.dirname(os.path.abspath(xrl.__file__))) == os.path.abspath(folder)
