"""The run's logger."""

from __future__ import annotations

import logging
import re

import pytest
from tqdm import tqdm

from xrl.metrics.console import LOGGER_NAME, setup_logging


@pytest.fixture(autouse=True)
def logger_as_before():
    logger = logging.getLogger(LOGGER_NAME)
    handlers, propagate, level = list(logger.handlers), logger.propagate, logger.level
    yield
    for handler in logger.handlers:
        handler.close()
    logger.handlers, logger.propagate = handlers, propagate
    logger.setLevel(level)


def test_rank_0_speaks_on_stderr_with_the_time(capsys):
    setup_logging().info("hello")
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO hello\n", err)


def test_other_ranks_show_only_errors_with_their_rank(capsys):
    logger = setup_logging(rank=3)
    logger.info("hello")
    logger.error("lost")
    err = capsys.readouterr().err
    assert "hello" not in err
    assert err.startswith("[rank 3] ")
    assert "lost" in err


def test_log_file_gets_everything_of_its_rank(tmp_path, capsys):
    logger = setup_logging(rank=3, log_file=tmp_path / "rank3.log")
    logger.info("hello")
    assert "hello" in (tmp_path / "rank3.log").read_text()
    assert capsys.readouterr().err == ""


def test_what_is_quoted_cannot_command_the_terminal(tmp_path, capsys):
    logger = setup_logging(log_file=tmp_path / "log")
    try:
        raise ValueError("the judge choked on \x1b]0;title\x07")
    except ValueError:
        logger.exception("answer %s", "\x1b[2Jgood\rbad\u202e")
    for text in (capsys.readouterr().err, (tmp_path / "log").read_text()):
        assert "answer \\x1b[2Jgood\\x0dbad\\u202e" in text
        assert "choked on \\x1b]0;title\\x07" in text
        assert "\x1b" not in text and "\r" not in text


def test_name_that_is_not_utf_8_is_logged(tmp_path):
    setup_logging(log_file=tmp_path / "log").info("saved %s", "d\udce9mo")
    assert "saved d\\udce9mo" in (tmp_path / "log").read_text()


def test_a_second_set_up_does_not_double_the_lines(capsys):
    setup_logging()
    setup_logging().info("once")
    assert capsys.readouterr().err.count("once") == 1


def test_a_child_logger_speaks_through_the_same_handler(capsys):
    setup_logging()
    logging.getLogger("xrl.rollout").info("from below")
    assert "from below" in capsys.readouterr().err


def test_lines_stand_above_a_progress_bar(capsys):
    logger = setup_logging()
    with tqdm(total=3, desc="rollout", ascii=True) as bar:
        bar.update()
        logger.info("between")
    lines = re.split(r"[\r\n]+", capsys.readouterr().err)
    assert any(re.fullmatch(r"\S+ \S+ INFO between", line) for line in lines)


def test_what_is_quoted_is_no_line_of_its_own(capsys):
    setup_logging().warning("the judge said %s", "no\n2026-01-01 00:00:00 INFO all is well\u2028x\x85y")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("the judge said no\\n2026-01-01 00:00:00 INFO all is well\\u2028x\\x85y")
