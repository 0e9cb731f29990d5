"""A folder that appears under its name when all of it is on disk, or not at all, and goes the same way."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from xrl.files.whole import flush_to_disk

logger = logging.getLogger(__name__)

# In a folder that is being written: whose it is.
_LOCK_FILE = "xrl-writes-here"


class NotRenamed(OSError):
    """A folder is whole, but could not be given its name. It stays, under the other one."""

    def __init__(self, partial: Path, target: Path, why: OSError) -> None:
        super().__init__(f"{partial} is whole, but cannot be renamed to {target.name}: {why.strerror}")
        self.partial = partial
        self.target = target


@contextlib.contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which appears under its name when all is written and flushed, or not at all.

    What a killed process leaves has another name, and is removed by the next try; nothing else is.

    Raises:
        FileExistsError: `target` exists, something of somebody else's has the other name, or another process writes
            there.
        NotRenamed: only the last step failed.
        OSError: the folder cannot be written, and nothing is left of it.
    """
    if os.path.lexists(target):
        raise FileExistsError(f"{target} exists already")
    partial = target.with_name(f".{target.name}.partial")
    lock = partial / _LOCK_FILE
    if os.path.lexists(partial) and not lock.is_file() and not (partial.is_dir() and not any(partial.iterdir())):
        raise FileExistsError(f"{partial} is in the way, and not ours to remove")
    partial.mkdir(parents=True, exist_ok=True)
    with _opened(lock) as held:
        _lock(held, target, partial)
        try:
            _empty(partial, but=lock)
            yield partial
            for path in partial.rglob("*"):
                flush_to_disk(path)
            flush_to_disk(partial)
        except BaseException:
            with contextlib.suppress(OSError):
                # The lock goes last: a folder without one is taken for somebody else's.
                _empty(partial, but=lock)
                shutil.rmtree(partial)
            raise
        # The lock goes along, and goes last: what a killed process leaves is either known as such or has its name.
        try:
            os.rename(partial, target)
        except OSError as error:
            with contextlib.suppress(OSError):  # it is whole: without a lock no other try takes it for leftovers
                lock.unlink()
            raise NotRenamed(partial, target, error) from error
        with contextlib.suppress(OSError):
            (target / _LOCK_FILE).unlink()
    with contextlib.suppress(OSError):  # it is there, and only a power cut could still take it away
        flush_to_disk(target.parent)


def remove_folder(target: Path) -> None:
    """Remove a folder that loses its name first: nobody ever finds a part of it under that name.

    What a killed process leaves of it, `remove_leftovers` removes.

    Raises:
        OSError: it cannot be removed; it is whole as long as it has its name.
    """
    going = target.with_name(f".{target.name}.deleted")
    if going.is_dir():
        shutil.rmtree(going)
    os.rename(target, going)
    try:
        shutil.rmtree(going)
    except BaseException:  # such as a signal, which comes only once
        shutil.rmtree(going, ignore_errors=True)
        raise


def remove_leftovers(folder: Path, name: re.Pattern[str]) -> None:
    """Remove what killed processes left of folders of such names, half written or half removed, as far as it can be.

    A folder in which another process writes stays, and so does one of which that cannot be told.
    """
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            whole, _, ending = path.name.removeprefix(".").rpartition(".")
            if not path.name.startswith(".") or not name.fullmatch(whole) or path.is_symlink() or not path.is_dir():
                continue
            if ending == "deleted":
                shutil.rmtree(path, ignore_errors=True)
            elif ending == "partial":
                _remove_partial(path)


def _remove_partial(partial: Path) -> None:
    lock = partial / _LOCK_FILE
    with contextlib.suppress(OSError), lock.open("r+") as held:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _empty(partial, but=lock)
        shutil.rmtree(partial)


@contextlib.contextmanager
def _opened(lock: Path) -> Iterator[IO[str]]:
    """The lock file, made where there is none; where it cannot be made, its folder goes too."""
    try:
        held = lock.open("a")
    except BaseException:
        with contextlib.suppress(OSError):
            lock.parent.rmdir()
        raise
    with held:
        yield held


def _empty(folder: Path, *, but: Path) -> None:
    for path in folder.iterdir():
        if path != but:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


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
