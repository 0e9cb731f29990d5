"""A worker's log stays small, and is text."""

from __future__ import annotations

import logging

import pytest

from xrl.rollout.worker_log import CappedHandler


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
