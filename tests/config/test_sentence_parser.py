"""Small commands tell bad input as everything else does."""

from __future__ import annotations

from pathlib import Path

import pytest

from xrl.config import SettingsError
from xrl.config.sentence_parser import SentenceParser


@pytest.fixture
def parser() -> SentenceParser:
    parser = SentenceParser(prog="xrl test")
    parser.add_argument("--size", type=int, default=1)
    parser.add_argument("--file", type=Path)
    return parser


def test_numbers_are_read(parser: SentenceParser) -> None:
    assert parser.parse_args(["--size", "12"]).size == 12
    assert parser.parse_args(["--size=-3"]).size == -3


@pytest.mark.parametrize("text", ["two", "²", "٣", "1_0", " 1", "1.0", "0x1", "", "9" * 5000, "2147483648"])
def test_other_numbers_are_one_sentence(parser: SentenceParser, text: str) -> None:
    with pytest.raises(SettingsError, match="^argument --size: ") as caught:
        parser.parse_args([f"--size={text}"])
    assert str(caught.value).isprintable()


def test_what_is_quoted_is_no_line_of_its_own(parser: SentenceParser) -> None:
    for word in ("--siz\x1be", "\nxrl: error: fake", "--size=\u202e"):
        with pytest.raises(SettingsError) as caught:
            parser.parse_args([word])
        assert str(caught.value).isprintable()
