"""Whether a disk has room for what is going to be written. Torch-free."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from xrl.config import SettingsError


def nearest_folder(path: Path) -> Path:
    """The path itself, or the nearest one above it that exists."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if os.path.lexists(parent))


def check_space(path: Path, num_bytes: int, *, what: str, instead: str = "") -> None:
    """Refuse to start what cannot be written.

    Args:
        path: where to; it need not exist yet.
        what: subject of the sentence.
        instead: what else to do about it, as the end of a sentence.

    Raises:
        SettingsError: its disk has less than `num_bytes` free.
    """
    # Some network file systems do not say how large they are.
    try:
        usage = shutil.disk_usage(nearest_folder(path))
    except OSError:
        return
    if usage.total and usage.free < num_bytes:
        raise SettingsError(f"{what} needs {num_bytes:,} bytes, its disk has {usage.free:,} free{instead}")
