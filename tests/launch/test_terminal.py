"""Text of others reaches a terminal as text."""

from __future__ import annotations

import logging
import subprocess
import sys
from typing import Any

import numpy
import pytest

from xrl.config import SettingsError
from xrl.launch.terminal import PrintableRecord, say, show_foreign_text_printable


def test_messages_are_one_printable_line(capsys: pytest.CaptureFixture[str]) -> None:
    say("the row says \x1b[2J\nxrl: error: fake")
    assert capsys.readouterr().err == "xrl: the row says \\x1b[2J\\nxrl: error: fake\n"


def test_announced_errors_are_printable() -> None:
    program = (
        "from xrl.config import SettingsError; from xrl.launch.exit import run_main\n"
        "def main(): raise {kind}('label \\x1b[2J')\n"
        "run_main(main)"
    )
    for kind in (SettingsError, ValueError):
        found = subprocess.run([sys.executable, "-c", program.format(kind=kind.__name__)], capture_output=True)
        assert found.returncode and b"\\x1b[2J" in found.stderr and b"\x1b" not in found.stderr


def test_uncaught_errors_are_printable() -> None:
    program = (
        f"from {show_foreign_text_printable.__module__} import show_foreign_text_printable\n"
        "show_foreign_text_printable(); raise ValueError('tensor \\x1b[2J')"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert found.returncode == 1
    assert b"Traceback" in found.stderr and b"ValueError: tensor \\x1b[2J" in found.stderr
    assert b"\x1b" not in found.stderr


def test_what_an_error_quotes_is_no_message_of_ours() -> None:
    program = (
        "from xrl.launch.exit import run_main\n"
        "def main(): raise ValueError('the judge said\\nxrl: error: fake\\u2028xrl: error: fake')\n"
        "run_main(main)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert [line for line in found.stderr.splitlines() if line.startswith("xrl: ")] == [
        "xrl: error: ValueError: the judge said"
    ]


def record(message: object, *values: object, **more: Any) -> logging.LogRecord:
    return PrintableRecord("library", logging.WARNING, "file.py", 1, message, values, more.get("exc_info"))


def test_values_in_a_record_are_no_lines_of_their_own() -> None:
    found = record("key %s of %s: %d of %.1f", "a\nxrl: error: fake", ValueError("b\r\x1b[2J"), 3, 0.5)
    assert found.getMessage() == "key a\\nxrl: error: fake of b\\x0d\\x1b[2J: 3 of 0.5"


def test_the_tail_of_a_log_stays_several_lines() -> None:
    tail = "the end of worker_0.log:\n  one\x1b[2J\n  two"
    assert record("lost; %s", tail).getMessage() == "lost; the end of worker_0.log:\n  one\\x1b[2J\n  two"


def test_records_of_libraries_keep_their_meaning() -> None:
    assert record("%(a)s and %(b)d", {"a": "x", "b": 2}).getMessage() == "x and 2"
    assert record("100%").getMessage() == "100%"
    assert record(ValueError("no text\x1b")).getMessage() == "no text\\x1b"
    assert record("%d", numpy.int64(3)).getMessage() == "3"

    class Three:
        def __int__(self) -> int:
            return 3

        __index__ = __int__

    assert record("%d of %s", Three(), "\x1b").getMessage() == "3 of \\x1b"


def test_tracebacks_of_libraries_are_printable() -> None:
    program = (
        "from xrl.launch.terminal import show_foreign_text_printable\n"
        "import logging; show_foreign_text_printable()\n"
        "try: raise ValueError('tensor \\x1b[2J')\n"
        "except ValueError: logging.getLogger('library').exception('it failed: %s', '\\u202e')\n"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "it failed: \\u202e" in found.stderr and "ValueError: tensor \\x1b[2J" in found.stderr
    assert "\x1b" not in found.stderr and "\u202e" not in found.stderr
