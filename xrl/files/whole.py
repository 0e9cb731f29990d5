"""Files that appear whole or not at all, and files that grow by whole records."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections import deque
from pathlib import Path

from xrl.files.disk import NotWritten

logger = logging.getLogger(__name__)

# What a file system says that cannot flush a folder, or a file opened for reading; nothing is lost by that.
_CANNOT_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EISDIR, errno.EACCES)


def write_whole(path: Path, content: bytes, *, flush: bool = True) -> None:
    """Write a file that appears under its name when all of it is written, whatever stops the process.

    Args:
        path: where to; a file that is there is replaced.
        flush: wait until it is on the disk, so that even a power cut leaves all of it or nothing.

    Raises:
        NotWritten: nothing was written, and a file that was there is as it was.
    """
    # In the same folder, because a rename is atomic only within one file system.
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        try:
            partial.write_bytes(content)
            if flush:
                flush_to_disk(partial)
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise NotWritten(path, error, num_bytes=len(content)) from error
    if flush:
        with contextlib.suppress(OSError):  # it is there, and only a power cut could still take it away
            flush_to_disk(path.parent)


class WholeRecords:
    """A file that grows by whole records: one that cannot be written leaves no trace, and comes with the next one.

    It is opened anew for each record: so it is noticed when its folder has gone or its disk may no longer be written,
    and a file that somebody removed is begun again.
    """

    # Held back while nothing can be written; beyond that the oldest records are given up.
    MAX_WAITING_BYTES = 16 * 2**20

    def __init__(self, path: Path, *, head: bytes = b"", make_folder: bool = False) -> None:
        """
        Args:
            path: the file, which need not exist; what it has is kept.
            head: what an empty file begins with.
            make_folder: whether its folder is made, where only that is missing.
        """
        self.path = path
        self._head = head
        self._make_folder = make_folder
        self._waiting: deque[bytes] = deque()
        self._num_waiting_bytes = 0
        self._has_lost = False
        self._torn_from: int | None = None  # where a record begins that could be neither written nor taken back

    def append(self, record: bytes) -> None:
        """Write a record, after those that could not be written before.

        Raises:
            NotWritten: it waits for the next call.
        """
        self._waiting.append(record)
        self._num_waiting_bytes += len(record)
        while self._num_waiting_bytes > self.MAX_WAITING_BYTES and len(self._waiting) > 1:
            self._num_waiting_bytes -= len(self._waiting.popleft())
            if not self._has_lost:
                logger.warning("%s: more waits to be written than is held; the oldest records are lost", self.path)
            self._has_lost = True
        self.flush()

    def flush(self) -> None:
        """Write what waits.

        Raises:
            NotWritten: it goes on waiting.
        """
        if not self._waiting:
            return
        try:
            if self._make_folder:
                self.path.parent.mkdir(exist_ok=True)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                self._extend(descriptor, b"".join(self._waiting))
            finally:
                os.close(descriptor)
        except OSError as error:
            raise NotWritten(self.path, error, num_bytes=self._num_waiting_bytes) from error
        self._waiting.clear()
        self._num_waiting_bytes = 0

    def _extend(self, descriptor: int, content: bytes) -> None:
        """Append all of `content`, or nothing."""
        size = os.fstat(descriptor).st_size
        if self._torn_from is not None and self._torn_from < size:
            os.ftruncate(descriptor, self._torn_from)
            size = self._torn_from
        self._torn_from = size
        rest = memoryview(content if size else self._head + content)
        try:
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        except BaseException:
            with contextlib.suppress(OSError):  # else the next call takes it back
                os.ftruncate(descriptor, size)
                self._torn_from = None
            raise
        self._torn_from = None


def flush_to_disk(path: Path) -> None:
    """Wait until a file or folder is on the disk, where its file system can say so.

    Raises:
        OSError: the disk is full or fails.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_FLUSH:
            raise
