"""Reading the final answer and its number."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xrl.rewards.answer import final_answer, parse_number


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("48/2 = 24.\n#### 72", "72"),
        ("####72", "72"),
        ("##### 72", "72"),
        ("#### 5 #### 7", "7"),
        ("#### 72 ####", "72"),
        ("#### 72\n####\n", "72"),
        ("####\n72\n", "72"),
        ("#### 72\nThat took 5 steps.", "72"),
        (r"so \boxed{7}, no, \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{7} #### 8", "8"),
        (r"#### \boxed{8}", r"\boxed{8}"),
        ("The answer is 72.", None),
        ("72 ####", None),
        (r"\boxed{7", None),
        (r"\boxed{}", None),
        ("", None),
    ],
)
def test_final_answer(response: str, answer: str | None) -> None:
    assert final_answer(response) == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("72", 72),
        ("72.", 72),
        ("72.00", 72),
        ("072", 72),
        (".5", Fraction(1, 2)),
        ("0.1", Fraction(1, 10)),
        ("-5", -5),
        ("\u22125", -5),
        ("-$5", -5),
        ("$-5", -5),
        ("- 5", 5),  # a list item
        ("1,000", 1000),
        ("1,234,567.5", Fraction(2469135, 2)),
        ("1 000", 1000),
        ("1\u202f000", 1000),
        ("1'000", 1000),
        (r"1{,}000", 1000),
        (r"1\,000", 1000),
        ("1/2", Fraction(1, 2)),
        ("-1/2", Fraction(-1, 2)),
        ("3 1/2", Fraction(7, 2)),
        (r"\frac{1}{2}", Fraction(1, 2)),
        (r"-\dfrac{1}{2}", Fraction(-1, 2)),
        (r"3\frac{1}{2}", Fraction(7, 2)),
        ("1e3", 1000),
        ("2.5E-1", Fraction(1, 4)),
        ("$72", 72),
        (r"\$72", 72),
        ("€72", 72),
        ("72%", 72),
        (r"72\%", 72),
        ("72 apples", 72),
        ("72kg", 72),
        ("72 apples in 3 boxes", 72),
        (r"72\text{ apples}", 72),
        ("72 (6*12)", 72),
        ("72 - the total", 72),
        ("**72**", 72),
        ("`72`", 72),
        ("_72_", 72),
        ("$72$", 72),
        (r"\(72\)", 72),
        (r"\boxed{72}", 72),
        ("The answer is 72.", 72),
        ("x = 72", 72),
        ("48 + 24 = 72", 72),
        ("H2O weighs 3", 3),
        ("5 or 7", 5),
    ],
)
def test_number_is_read(text: str, number: int | Fraction) -> None:
    assert parse_number(text) == number


@pytest.mark.parametrize(
    "text",
    ["", "apples", "48 + 24", "5-7", "3*4", "3 × 4", "3x4", "2^3", "5²", r"3 \times 4", "1/0", "1/2/3", "1,00", "12:30"]
    + ["1.000.000", "12,5,7", "1e999", "x2", "1e3e3"],
)
def test_what_is_not_one_finished_number_is_none(text: str) -> None:
    assert parse_number(text) is None


@given(st.fractions(min_value=-(10**12), max_value=10**12))
def test_every_fraction_survives_being_written(value: Fraction) -> None:
    assert parse_number(str(value)) == value


@given(
    st.integers(-(10**15), 10**15),
    st.sampled_from(["{:,}", "{}.00", "${}", "**{}**", "{} apples", r"\boxed{{{}}}", "{:,}."]),
)
def test_every_integer_survives_its_dress(value: int, dress: str) -> None:
    answer = final_answer(f"Some steps 1+1=2.\n#### {dress.format(value)}")
    assert answer is not None
    assert parse_number(answer) == value


@given(st.text(alphabet="0123456789#$%,.-/ \\boxed{}frac=eE*+\n", max_size=400))
def test_no_text_raises(text: str) -> None:
    answer = final_answer(text)
    parse_number(text if answer is None else answer)
