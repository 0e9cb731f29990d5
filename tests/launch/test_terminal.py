"""Text of others reaches a terminal as text."""

from __future__ import annotations

import subprocess
import sys

import pytest

from xrl.config import SettingsError
from xrl.launch.terminal import one_line, printable, say, show_uncaught_printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;owned\x07", "\\x1b]0;owned\\x07"),
        ("good\rbad", "good\\x0dbad"),
        ("\x9b2J", "\\x9b2J"),
        ("\x08\x7f\x00", "\\x08\\x7f\\x00"),
        ("a\u202eb\u2066c", "a\\u202eb\\u2066c"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("é 中 🎂", "é 中 🎂"),
    ],
)
def test_what_a_terminal_would_obey_is_shown_as_its_escape(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_part_of_a_line_ends_no_line() -> None:
    assert one_line("a\nb\tc\u2028d\u2029e\r\x85é") == "a\\x0ab\\x09c\\u2028d\\u2029e\\x0d\\x85é"


def test_messages_are_printable(capsys: pytest.CaptureFixture[str]) -> None:
    say("the row says \x1b[2J")
    assert capsys.readouterr().err == "xrl: the row says \\x1b[2J\n"


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
        f"from {show_uncaught_printable.__module__} import show_uncaught_printable\n"
        "show_uncaught_printable(); raise ValueError('tensor \\x1b[2J')"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert found.returncode == 1
    assert b"Traceback" in found.stderr and b"ValueError: tensor \\x1b[2J" in found.stderr
    assert b"\x1b" not in found.stderr
