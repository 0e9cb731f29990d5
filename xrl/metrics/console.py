"""The run's logger: what a person reads while it runs."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from tqdm import tqdm

from xrl.launch.terminal import PrintableRecord, printable

LOGGER_NAME = "xrl"
FORMAT = "%(asctime)s %(levelname)s %(message)s"
TIME_FORMAT = "%Y-%m-%d %H:%M:%S"


class _PrintableFormatter(logging.Formatter):
    """Lines quote answers and what workers and judges said: none of it may command a terminal, nor fake a file."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _BarFriendlyHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes lines to stderr above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


def setup_logging(*, rank: int = 0, log_file: Path | None = None) -> logging.Logger:
    """Set up and return the logger "xrl"; called once per process, a second call replaces the first.

    Rank 0 speaks; other ranks show only errors, with their rank in front. Lines go to stderr: stdout stays free for
    results that programs read.

    Args:
        rank: global rank of this process.
        log_file: also write everything this rank logs to this file.
    """
    logging.setLogRecordFactory(PrintableRecord)
    logger = logging.getLogger(LOGGER_NAME)
    for old in list(logger.handlers):
        logger.removeHandler(old)
        old.close()
    logger.setLevel(logging.INFO)
    logger.propagate = False  # a library that calls basicConfig would print every line twice
    formatter = _PrintableFormatter(FORMAT if rank == 0 else f"[rank {rank}] {FORMAT}", TIME_FORMAT)
    console = _BarFriendlyHandler(sys.stderr)
    console.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    handlers: list[logging.Handler] = [console]
    if log_file is not None:
        handlers.append(logging.FileHandler(log_file, encoding="utf-8", errors="backslashreplace"))
    for handler in handlers:
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    return logger
