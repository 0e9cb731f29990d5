"""Fields that somebody else wrote."""

from __future__ import annotations

import math

import pytest

from xrl.rollout.fields import INT64, float_of, int_of, ints_of, object_from_json, object_of, shown, text_of


@pytest.mark.parametrize("value", [None, True, 1.0, "1", 10, -1, 2**70, math.nan, [], {}])
def test_number_of_another_type_or_out_of_range_is_refused_by_name(value: object) -> None:
    with pytest.raises(ValueError, match=r"^n must be a whole number in \[0, 9\], found "):
        int_of({"n": value}, "n", within=range(10))
    with pytest.raises(ValueError, match=r"^ids must hold whole numbers in \[0, 9\]"):
        ints_of([1, value], "ids", most=5, within=range(10))


@pytest.mark.parametrize("value", [None, True, "1", -0.1, 1.1, 2**2000, -(2**2000), math.nan, math.inf, [1]])
def test_float_must_be_one_and_in_its_range(value: object) -> None:
    with pytest.raises(ValueError, match=r"^p must be a number in \[0, 1\]"):
        float_of({"p": value}, "p", low=0.0, high=1.0)


def test_whole_number_is_a_float_too() -> None:
    assert float_of({"p": 1}, "p", low=0.0, high=1.0) == 1.0
    assert int_of({}, "n", within=INT64, default=3) == 3


@pytest.mark.parametrize("value", [None, 1, "", "x" * 6, "a\x1b", "a\n", "a\u202e", []])
def test_text_must_be_short_and_printable(value: object) -> None:
    with pytest.raises(ValueError, match=r"^id must be a text of 1 to 5 printable characters"):
        text_of({"id": value}, "id", longest=5)


@pytest.mark.parametrize(
    "text",
    [b"", b"\xff", b"[1]", b"5", b"NaN", b'{"a": Infinity}', b"[" * 10**5, b'{"a":' * 10**5, b"1" * 5000, b"{}x"],
)
def test_text_that_holds_no_object_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match="^the body "):
        object_from_json(text, "the body")


def test_object_within_an_object() -> None:
    assert object_of(object_from_json(b'{"a": {"b": 1}}', "the body"), "a") == {"b": 1}
    with pytest.raises(ValueError, match="^a must be a JSON object"):
        object_of({"a": []}, "a")


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, [1] * 10**6, {str(n): n for n in range(100)}, 10**5000, [["y" * 10**6]]],
    ids=["text", "list", "object", "number", "nested"],
)
def test_large_value_is_shown_by_its_beginning_or_its_size(value: object) -> None:
    assert len(shown(value)) < 80
