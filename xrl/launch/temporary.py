"""A folder below the system's temporary one, for as long as this process lives; what a killed one left is removed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PREFIX = "xrl-"
# In each folder: locked by the process that uses it, in whatever container that runs.
LOCK_FILE = "in-use"
# A folder that was just made may not be locked yet.
YOUNG_S = 60.0


@contextlib.contextmanager
def own_folder() -> Iterator[Path]:
    """A new folder, which goes with the block."""
    _remove_leftovers(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=PREFIX, ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with (folder / LOCK_FILE).open("w") as lock:
            with contextlib.suppress(OSError):  # a file system without locks: then nothing is removed from it either
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield folder


def remove_abandoned(folder: Path) -> None:
    """Remove a folder of `own_folder` if its process is gone. Another one may be at it as well."""
    with contextlib.suppress(OSError), (folder / LOCK_FILE).open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)


def _remove_leftovers(parent: Path) -> None:
    """Remove our folders whose process was killed; nothing here is worth an error."""
    with contextlib.suppress(OSError):
        for folder in parent.glob(f"{PREFIX}*"):
            with contextlib.suppress(OSError):
                found = (folder / LOCK_FILE).lstat()
                if found.st_uid == os.getuid() and time.time() - found.st_mtime >= YOUNG_S:
                    remove_abandoned(folder)
