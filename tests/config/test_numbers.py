"""Numbers are ASCII digits, wherever they are read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xrl.config import SettingsError
from xrl.config.numbers import check_at_most, decimal_number, numbered, whole_number

NO_NUMBERS = [
    "", " ", "-", "--1", "+5", " 5", "5 ", "5\n", "1_000", "1,000", "²", "٣", "１２", "五", "0x10", "1e3", "5.0", "nan",
    "1" * 20, "1" * 5000, "-" + "9" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("text", NO_NUMBERS, ids=lambda text: ascii(text[:9]))
def test_other_spellings_are_no_whole_numbers(text: str) -> None:
    assert whole_number(text) is None


@pytest.mark.parametrize(
    "text", ["", ".", "-", "1e", "e3", "+1.5", " 1.5", "1_0.5", "٣.٥", "²", "inf", "-nan", "1e999", "1" * 5000, "1e1_0"]
)
def test_other_spellings_are_no_numbers(text: str) -> None:
    assert decimal_number(text) is None


@given(st.integers(min_value=-(10**19) + 1, max_value=10**19 - 1))
def test_whole_numbers_are_read(number: int) -> None:
    assert whole_number(str(number)) == number


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_are_read_as_python_writes_them(number: float) -> None:
    assert decimal_number(repr(number)) == number


@pytest.mark.parametrize("text", ["1e-6", "1.0E+16", "5.", ".5", "0", "007"])
def test_usual_spellings_are_read(text: str) -> None:
    assert decimal_number(text) == float(text)


def test_only_names_that_we_gave_have_a_number() -> None:
    assert [numbered(name, "hf-") for name in ("hf-0", "hf-12")] == [0, 12]
    for name in ("hf-", "hf-final", "hf-07", "hf--1", "hf-²", "hf-٣", "hf-1.old", "hf-" + "1" * 5000, "7", "xhf-7"):
        assert numbered(name, "hf-") is None


def test_a_number_that_is_too_large_is_named() -> None:
    check_at_most("--size", 10, 10)
    with pytest.raises(SettingsError, match="--size must be at most 1,000, got 1e\\+308"):
        check_at_most("--size", 1e308, 1000)
