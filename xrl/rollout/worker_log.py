"""What a worker writes to its log: of bounded size, whatever is asked of it, and nothing that commands a terminal."""

from __future__ import annotations

import logging
import sys

from xrl.launch.terminal import printable

MAX_LOG_BYTES = 2 * 2**20
_FORMAT, _TIME_FORMAT = "%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"


class CappedHandler(logging.Handler):
    """Records to stderr, until they come to `most_bytes`; then it says so, and no more."""

    def __init__(self, *, most_bytes: int = MAX_LOG_BYTES) -> None:
        super().__init__(logging.INFO)
        self.setFormatter(logging.Formatter(_FORMAT, _TIME_FORMAT))
        self._left = most_bytes

    def emit(self, record: logging.LogRecord) -> None:
        if self._left <= 0:
            return
        line = printable(self.format(record))
        self._left -= len(line.encode(errors="replace")) + 1
        if self._left <= 0:
            line = "this log has come to its largest size: nothing more is written to it"
        print(line, file=sys.stderr, flush=True)


def set_up_worker_log() -> None:
    """From now on what is logged in this process, by libraries too, goes through one capped handler."""
    logging.basicConfig(level=logging.WARNING, handlers=[CappedHandler()], force=True)
