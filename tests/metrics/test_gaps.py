"""A run goes on where its logs cannot be written, and says so once."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest

from xrl.metrics.gaps import LogGaps


class Log:
    """Fails with the error number that it is given, or is written."""

    def __init__(self, name: str, gaps: LogGaps) -> None:
        self.name = name
        self.gaps = gaps

    def write(self, number: int | None = None, *, rollout: int | None = None) -> bool:
        def action() -> None:
            if number is not None:
                raise OSError(number, os.strerror(number))

        return self.gaps.try_to(action, self.name, Path("/run") / self.name, rollout=rollout)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("xrl"), "propagate", True)
    return caplog


def test_a_gap_is_said_when_it_begins_and_when_it_is_over(said: pytest.LogCaptureFixture) -> None:
    gaps = LogGaps()
    metrics, answers = Log("metrics.jsonl", gaps), Log("answers", gaps)
    assert metrics.write() and answers.write(rollout=1) and said.messages == []
    for rollout in (2, 3, 4):
        assert not answers.write(errno.ENOSPC, rollout=rollout)
        assert not metrics.write(errno.ENOSPC)
    (message,) = said.messages
    assert message.startswith("/run/answers cannot be written: No space left on device: its disk has ")
    assert message.endswith("; the run goes on, and its logs as soon as they can be written")
    assert answers.write(rollout=5) and len(said.messages) == 1  # the other still fails
    assert metrics.write()
    assert said.messages[1:] == ["logs are written again; the answers of 3 rollouts between 2 and 4 are missing"]
    answers.write(errno.ENOSPC, rollout=6)
    answers.write()
    assert said.messages[3:] == ["logs are written again; the answers of rollout 6 are missing"]


def test_where_no_answers_are_missing_none_are_said_to_be(said: pytest.LogCaptureFixture) -> None:
    metrics = Log("metrics.jsonl", LogGaps())
    metrics.write(errno.EIO)
    metrics.write()
    assert said.messages[1:] == ["logs are written again"]


def test_a_gap_that_lasts_to_the_end_is_said_then(said: pytest.LogCaptureFixture) -> None:
    gaps = LogGaps()
    metrics, answers = Log("metrics.jsonl", gaps), Log("answers", gaps)
    gaps.end()
    assert said.messages == []
    answers.write(errno.ENOSPC, rollout=8)
    metrics.write()
    gaps.end()
    assert said.messages[1:] == ["answers could not be written to the end; the answers of rollout 8 are missing"]
    metrics.write(errno.ENOSPC)
    answers.write()
    gaps.end()
    assert said.messages[2:] == ["metrics.jsonl could not be written to the end; the answers of rollout 8 are missing"]


def test_another_reason_is_another_warning(said: pytest.LogCaptureFixture) -> None:
    metrics = Log("metrics.jsonl", LogGaps())
    for number in (errno.ENOSPC, errno.EROFS, errno.ENOSPC, errno.EROFS):
        metrics.write(number)
    assert [message.split(": ")[1] for message in said.messages] == ["No space left on device", "Read-only file system"]


@pytest.mark.parametrize("name", ["EDQUOT", "EIO", "EROFS", "EFBIG", "EACCES", "ENOENT", "ENOTDIR", "ESTALE", "EMFILE"])
def test_whatever_the_system_says_the_run_goes_on(name: str, said: pytest.LogCaptureFixture) -> None:
    assert not Log("metrics.jsonl", LogGaps()).write(getattr(errno, name))
    assert os.strerror(getattr(errno, name)) in said.text
