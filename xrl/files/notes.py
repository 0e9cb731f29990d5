"""Notes that two processes of one host leave each other in a folder: a small store without a server."""

from __future__ import annotations

from pathlib import Path

from xrl.files.disk import NotWritten
from xrl.files.whole import write_whole

MOST_BYTES = 1 << 20


class Notes:
    """Values by key, each a file. The folder is made with the first note.

    Written and read as torch's stores are; a note that is not there is no reason to wait.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def set(self, key: str, value: str) -> None:
        """Write.

        Raises:
            OSError: it cannot be written.
        """
        self.folder.mkdir(exist_ok=True)
        try:
            write_whole(self._file(key), value.encode(), flush=False)
        except NotWritten as error:
            raise OSError(str(error)) from error

    def get(self, key: str) -> bytes:
        """Read, MOST_BYTES at most.

        Raises:
            OSError: it is not there, or cannot be read.
        """
        with self._file(key).open("rb") as file:
            return file.read(MOST_BYTES)

    def check(self, keys: list[str]) -> bool:
        """Whether all of them have been written."""
        return all(self._file(key).is_file() for key in keys)

    def add(self, key: str, amount: int) -> int:
        """Add to a number, 0 where there is none, and return the sum. Of two that do so at once, one may be lost."""
        total = amount + (int(self.get(key)) if self.check([key]) else 0)
        self.set(key, str(total))
        return total

    def _file(self, key: str) -> Path:
        return self.folder / key.replace("/", "-")
