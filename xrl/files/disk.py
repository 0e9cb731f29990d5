"""Room on a disk: whether what is going to be written fits, and what to say where something could not be written."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
from pathlib import Path

from xrl.config import SettingsError

# How Rust, and so safetensors, names what the system said.
_RUST_ERROR = re.compile(r"\(os error (\d+)\)|\bcode: (\d+)\b")


class NotWritten(OSError):
    """A file or folder could not be written: which one, what the system says, how much room it needs and how much is
    free."""

    def __init__(self, path: Path, why: Exception, *, num_bytes: int) -> None:
        """
        Args:
            path: what was to be written.
            why: an OSError, or what a library made of one.
            num_bytes: of `path`, as far as they are known; 0 where they are not.
        """
        number, reason = _cause(why)
        super().__init__(number, reason)
        self.path = path
        self.num_bytes = num_bytes
        other = getattr(why, "filename", None)  # such as a file that was to be copied
        other_path = None if other is None or isinstance(other, int) else Path(os.fsdecode(other))
        where = "" if other_path is None or _is_part(other_path, path) else f" ({other_path})"
        self._sentence = f"{path} cannot be written: {reason}{where}{_room(path, num_bytes)}"

    def __str__(self) -> str:
        return self._sentence

    @property
    def lacks_room(self) -> bool:
        """Whether it failed because the disk was full, and the disk still has less room than it needs."""
        free = free_bytes(self.path)
        return self.errno == errno.ENOSPC and free is not None and free < self.num_bytes


def nearest_folder(path: Path) -> Path:
    """The path itself, or the nearest one above it that exists."""
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if os.path.lexists(parent))


def free_bytes(path: Path) -> int | None:
    """Bytes that may still be written on the disk of a path, which need not exist; None where nobody says."""
    # Some network file systems do not say how large they are.
    try:
        usage = shutil.disk_usage(nearest_folder(path))
    except OSError:
        return None
    return usage.free if usage.total else None


def free_inodes(path: Path) -> int | None:
    """Files that may still be made on the disk of a path; None where nobody says, or they are not counted."""
    try:
        found = os.statvfs(nearest_folder(path))
    except OSError:
        return None
    return found.f_favail if found.f_files else None


def is_read_only(path: Path) -> bool:
    """Whether the disk of a path, which need not exist, takes no writes at all."""
    try:
        return bool(os.statvfs(nearest_folder(path)).f_flag & os.ST_RDONLY)
    except OSError:
        return False


def check_space(path: Path, num_bytes: int, *, what: str, num_files: int = 1, instead: str = "") -> None:
    """Refuse to start what cannot be written.

    Args:
        path: where to; it need not exist yet.
        what: subject of the sentence.
        num_files: files and folders that it consists of.
        instead: what else to do about it, as the end of a sentence.

    Raises:
        SettingsError: its disk has less than `num_bytes` free, or no room for so many files.
    """
    free, inodes = free_bytes(path), free_inodes(path)
    if free is not None and free < num_bytes:
        raise SettingsError(f"{what} needs {num_bytes:,} bytes, its disk has {free:,} free, so it is too full{instead}")
    if inodes is not None and inodes < num_files:
        raise SettingsError(
            f"{what} needs {num_files:,} files, its disk has room for {inodes:,} (inodes), so it is too full{instead}"
        )


def check_file_size(num_bytes: int, *, what: str) -> None:
    """Refuse to start what would need a larger file than this process may write.

    Raises:
        SettingsError: the shell's limit is lower.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limit != resource.RLIM_INFINITY and limit < num_bytes:
        raise SettingsError(
            f"{what} needs a file of {num_bytes:,} bytes, files of this process may have {limit:,}: raise `ulimit -f`"
        )


def _cause(why: Exception) -> tuple[int | None, str]:
    """The system's error number, where there is one, and a phrase."""
    if isinstance(why, OSError) and why.errno is not None:
        return why.errno, why.strerror or os.strerror(why.errno)
    found = _RUST_ERROR.search(str(why))
    if found:
        number = int(found[1] or found[2])
        return number, os.strerror(number)
    return None, str(why) or type(why).__name__


def _is_part(other: Path, path: Path) -> bool:
    """Whether a file is what was to be written, or beside it, such as under the name that it has until it is whole."""
    return path.parent in (other, *other.parents)


def _room(path: Path, num_bytes: int) -> str:
    free = free_bytes(path)
    parts = []
    if num_bytes:
        parts.append(f"it needs {num_bytes:,} bytes")
    if free_inodes(path) == 0:
        parts.append("its disk has no room for another file (inodes)")
    elif free is not None:
        parts.append(f"its disk has {free:,} free" if num_bytes else f"its disk has {free:,} bytes free")
    return f": {', '.join(parts)}" if parts else ""
