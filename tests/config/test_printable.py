"""What others wrote is text, never a command and never a line of its own."""

from __future__ import annotations

import json
import sys

import pytest

from xrl.config import SettingsError
from xrl.config.printable import one_line, printable, printable_json, shortened, shown

COMMANDS = (
    *map(chr, range(0x20)),
    *map(chr, range(0x7F, 0xA0)),
    *"\u061c\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069",
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b]0;owned\x07", "\\x1b]0;owned\\x07"),
        ("good\rbad", "good\\x0dbad"),
        ("\x9b2J", "\\x9b2J"),
        ("\x08\x7f\x00", "\\x08\\x7f\\x00"),
        ("a\u202eb\u2066c\u2028d", "a\\u202eb\\u2066c\\u2028d"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("half \ud83d, d\udce9mo", "half \\ud83d, d\\udce9mo"),
        ("é 中 🎂 👨\u200d👩\u200d👧", "é 中 🎂 👨\u200d👩\u200d👧"),
    ],
)
def test_what_a_terminal_would_obey_is_shown_as_its_escape(text: str, expected: str) -> None:
    assert printable(text) == expected


@pytest.mark.parametrize("command", COMMANDS, ids=ascii)
def test_one_line_holds_none_of_them(command: str) -> None:
    found = one_line(f"a{command}b")
    assert found != f"a{command}b" and found.isprintable() and len(found.splitlines()) == 1
    assert str(SettingsError(f"a{command}b")) == found


@pytest.mark.parametrize("command", COMMANDS, ids=ascii)
def test_json_says_the_same_in_escapes(command: str) -> None:
    line = json.dumps({"key": f"é{command}"}, ensure_ascii=False)
    found = printable_json(line)
    assert found.isprintable() and json.loads(found) == {"key": f"é{command}"}


def test_every_other_character_stays_as_it_is() -> None:
    codes = [*range(0xD800), *range(0xE000, sys.maxunicode + 1)]
    others = "".join(chr(code) for code in codes if chr(code) not in COMMANDS)
    assert one_line(others) == others


def test_long_text_loses_its_middle() -> None:
    assert shortened("a" * 10, 10) == "a" * 10
    assert shortened("a" * 50 + "b" * 50, 25) == "a" * 10 + " ... " + "b" * 10
    assert len(shown("x" * 10**6)) <= 100


def test_a_sentence_about_a_huge_value_can_be_read() -> None:
    assert len(str(SettingsError(f"found {'x' * 10**6}"))) <= 10_000
