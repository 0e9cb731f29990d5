"""What a judge writes to its standard streams, as far as its log may grow."""

from __future__ import annotations

import os

_CHUNK_BYTES = 1 << 16
# A judge that writes without end must not keep its keeper from looking elsewhere.
_MAX_CHUNKS = 64


class CappedOutput:
    """Copies from a pipe to a log until that is full; the rest is read, counted and dropped."""

    def __init__(self, log: int, max_bytes: int) -> None:
        """
        Args:
            log: descriptor of a file that is appended to.
            max_bytes: of the whole file, with what is there already.
        """
        self._log = log
        self._room = max(0, max_bytes - os.fstat(log).st_size)
        self.num_dropped = 0

    def take_from(self, pipe: int) -> bool:
        """Copy what is there, without waiting for more; False at the pipe's end."""
        for _ in range(_MAX_CHUNKS):
            try:
                chunk = os.read(pipe, _CHUNK_BYTES)
            except BlockingIOError:
                return True
            if not chunk:
                return False
            self._keep(chunk)
        return True

    def end(self) -> None:
        """Say in the log how much is missing."""
        if self.num_dropped:
            self._write(f"\n[the log is full: {self.num_dropped:,} bytes more were dropped]\n".encode())

    def _keep(self, chunk: bytes) -> None:
        kept = self._write(chunk[: self._room])
        self._room -= kept
        self.num_dropped += len(chunk) - kept

    def _write(self, data: bytes) -> int:
        """How much could be written; on a full disk, less."""
        try:
            return os.write(self._log, data) if data else 0
        except OSError:
            return 0
