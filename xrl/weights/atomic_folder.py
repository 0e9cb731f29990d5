"""A folder that appears under its name when all of it is on disk, or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)

# In a folder that is being written: whose it is.
_LOCK_FILE = "xrl-writes-here"
# What a file system says that cannot flush a folder, or a file opened for reading; nothing is lost by that.
_CANNOT_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EISDIR, errno.EACCES)


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which appears under its name when all is written and flushed, or not at all.

    What a killed process leaves has another name, and is removed by the next try; nothing else is.

    Raises:
        FileExistsError: `target` exists, something of somebody else's has the other name, or another process writes
            there.
        OSError: the folder cannot be written. Where only its last step fails, it stays, whole, under the other name.
    """
    if os.path.lexists(target):
        raise FileExistsError(f"{target} exists already")
    partial = target.with_name(f".{target.name}.partial")
    lock = partial / _LOCK_FILE
    if os.path.lexists(partial) and not lock.is_file() and not (partial.is_dir() and not any(partial.iterdir())):
        raise FileExistsError(f"{partial} is in the way, and not ours to remove")
    partial.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as held:
        _lock(held, target, partial)
        try:
            for leftover in partial.iterdir():
                if leftover != lock:
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            yield partial
            lock.unlink()
            for path in [*partial.rglob("*"), partial]:
                _flush(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        try:
            os.rename(partial, target)
        except OSError as error:
            # Not removed: it is whole, and its lock is gone, so that no other try takes it for leftovers.
            raise OSError(f"{partial} is whole, but cannot be renamed to {target.name}: {error.strerror}") from error
    _flush(target.parent)


def _lock(held: IO[str], target: Path, partial: Path) -> None:
    """Keep other processes out, where the file system has locks; several (Lustre, FUSE) have none."""
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise FileExistsError(f"another process writes {target}, in {partial}") from error
    except OSError as error:
        logger.warning(
            "%s is written without a lock, because its file system has none (%s): no other process may write it",
            *(target, error.strerror),
        )


def _flush(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_FLUSH:
            raise
