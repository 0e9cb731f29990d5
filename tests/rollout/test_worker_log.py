"""A worker's log stays small, and is text."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from xrl.rollout.worker_log import CappedHandler, set_up_worker_log


def test_log_ends_at_its_largest_size_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.Logger("worker")
    logger.addHandler(CappedHandler(most_bytes=1000))
    for place in range(100):
        logger.warning("line %d of many", place)
    *lines, last = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("WARNING line 0 of many") and 10 < len(lines) < 40
    assert last == "this log has come to its largest size: nothing more is written to it"


def test_log_holds_nothing_that_commands_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.Logger("worker")
    logger.addHandler(CappedHandler())
    logger.warning("title \x1b]0;owned\x07")
    assert r"title \x1b]0;owned\x07" in capsys.readouterr().err


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    """The root logger, which has its handlers and its level back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = []
    yield root
    root.handlers = handlers
    root.setLevel(level)


def test_what_libraries_log_goes_to_the_same_log_once(
    root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    root_logger.addHandler(logging.StreamHandler())  # a library's own
    set_up_worker_log()
    assert [type(handler) for handler in root_logger.handlers] == [CappedHandler]
    logging.getLogger("some.library").warning("it is warm")
    logging.getLogger("some.library").info("it is Tuesday")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(" WARNING it is warm")


def test_a_line_that_comes_to_the_end_of_the_log_is_left_out_whole(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.Logger("worker")
    logger.addHandler(CappedHandler(most_bytes=100))
    logger.warning("x" * 1000)
    logger.warning("more")
    assert capsys.readouterr().err == "this log has come to its largest size: nothing more is written to it\n"
