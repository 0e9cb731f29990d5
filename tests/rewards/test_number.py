"""Reading a number, whole or not at all."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xrl.rewards.number import parse_number, read_number

# Texts with digits that say no number, neither as a ground truth nor as an answer.
NO_NUMBER = [
    *["1, 2", "3 4", r"4 \text{ and } 6", "between 5 and 7", "5\u20137", "(1, 2)", "[1, 3]", r"(-\infty, 2)", "5; 6"],
    *[r"x \in (0, 4]", r"\sqrt{7}", r"2\sqrt{3}", r"2\pi", "2 pi", "2x+1", "2x", "3x^2", "4i", "3ab", "5!", "|5|"],
    *[r"\{7\}", "11_2", "5²", "10^{5}", "log(100)", "sqrt(25)", "f(2)", "5(3)", "2 (3)", "2(x+1)", "(x, 2)", "5e"],
    *["3 hours 20 minutes", "5 feet six inches", "5 apples and 3 pears", "1st: 3, 2nd: 4", "Step 2", "3 + 4", "3:45"],
    *["2:1", "1.2.3", "2024-01-05", "1/2/2024", "March 5", "5k", "7 mod 3", "5 (mod 7)", "72 (or 73)", "3 quarters"],
    *[
        "5 and a half",
        "5+",
        "5 and more",
        "$1.5m",
        "5..7",
        r"\pm 5",
        "5 ± 1",
        "x = 1, y = 2",
        "x = 1 or x = 2",
        "x < 5",
        r"x \le 5",
        "x != 5",
    ],
    *[
        "$72k",
        "72K",
        "72 MM",
        "72 mil",
        "72 Millionen",
        "72 млн",
        "72千",
        "72 grand",
        "5 p.m.",
        "5 o'clock",
        "5th of May",
    ],
    *[
        "5月",
        "第5",
        "5 and x",
        "5 per cent of x",
        "5 raised to the x",
        "5 times x",
        "5 times the sum",
        "5 or x",
        "5 etc",
    ],
    *[
        "5.3 repeating",
        "5 does not work",
        "3 pizzas and a half",
        "x=5\nx=6",
        "a, 5",
        "5, ...",
        "x ≡ 5",
        "5<sup>2</sup>",
    ],
    *["<s>5</s>", "5&pi;", "5 &lt; 6", "5<br>6", "-(1, 2)", "{5}{6}", "10 minus 5", "5、7", "5到7", "5。7"],
    *[r"\frac12\pi", r"\frac{\sqrt{3}}{2}", r"\log_2 8", "3 7/2", "0.333...", "0,123", "1, 234", "0x1F", r"\infty"],
]


@pytest.mark.parametrize(
    "text", ["72", "$1{,}000$", r"\frac{1}{2}", "x = 72", "48 + 24 = 72", r"72 \text{ cm}", "60 mph"]
)
def test_ground_truth_may_wear_dress_and_a_unit(text: str) -> None:
    assert read_number(text) == parse_number(text) is not None


def test_minus_and_a_space_are_a_sign_where_no_list_can_be_meant() -> None:
    assert read_number("- 5") == -5


@pytest.mark.parametrize(
    "text",
    [
        "The answer is 72.",
        "about 5",
        "2x + y = 5",
        "72, which is the total",
        "5 more than x",
        r"\theta = 5",
        *NO_NUMBER,
    ],
)
def test_ground_truth_of_other_words_is_none(text: str) -> None:
    assert read_number(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "1," * 50_000,
        "9" * 100_000,
        "(" * 50_000 + "1)",
        "1 " * 50_000,
        "*a " * 50_000 + "5",
        "10^" * 30_000,
        "<a " * 30_000,
        "=x\n" * 30_000,
    ],
)
def test_long_text_is_read_in_one_pass(text: str) -> None:
    assert parse_number(text) is None


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
        ("\u20135", -5),
        ("\u20115", -5),
        ("½", Fraction(1, 2)),
        ("5½", Fraction(11, 2)),
        (r"\frac34", Fraction(3, 4)),
        (r"\frac{-1}{2}", Fraction(-1, 2)),
        ("1.5 x 10^3", 1500),
        (r"1.5 \times 10^{3}", 1500),
        ("1.5 million", 1_500_000),
        ("18 dollars (16-3-4=9 eggs sold)", 18),
        ("72 (where n = total)", 72),
        ("5 (five)", 5),
        ("about 5", 5),
        ("$18/hour", 18),
        ("$18 a day", 18),
        ("x = - 5", -5),
        (r"90^\circ", 90),
        ("72 cm^2", 72),
        (r"72\text{ cm}^2", 72),
        (r"72 \, \mathrm{m/s}^{2}", 72),
        (r"72 \frac{\text{km}}{\text{h}}", 72),
        ("72 m2", 72),
        ("72 cm squared", 72),
        ("72 rpm", 72),
        ("72℃", 72),
        ("300 K", 300),
        (r"\boldsymbol{72}", 72),
        (r"{\bf 72}", 72),
        (r"\Large{72}", 72),
        (r"\textcolor{red}{72}", 72),
        ("72 \\\\", 72),
        ("<span>72</span>", 72),
        ("72&nbsp;", 72),
        ("72 m<sup>2</sup>", 72),
        ("72<|im_end|>", 72),
        ("72</s>", 72),
        ("<<48+24=72>>72", 72),
        ("72 ✅", 72),
        ("→ 72", 72),
        ("\u300c72\u300d\u3002", 72),
        ("答案是７２。", 72),
        ("答案：72个", 72),
        ("１，２３４，５６７", 1_234_567),
        ("\u0661\u066c\u0662\u0663\u0664\u066b\u0665", Fraction(2469, 2)),
        ("1_234_567", 1_234_567),
        (r"1\text{,}234", 1234),
        (r"3{.}5", Fraction(7, 2)),
        ("72万元", 720_000),
        ("5 lakh", 500_000),
        ("1.5 × 10⁶", 1_500_000),
        ("1.5*10**6", 1_500_000),
        ("3 1 / 2", Fraction(7, 2)),
        (r"{7 \over 2}", Fraction(7, 2)),
        (r"\frac{\text{1}}{\text{2}}", Fraction(1, 2)),
        (r"\frac{1}{-2}", Fraction(-1, 2)),
        (r"-\left(\frac{1}{2}\right)", Fraction(-1, 2)),
        ("(-1)/2", Fraction(-1, 2)),
        ("- 5", -5),
        (r"- \frac{1}{2}", Fraction(-1, 2)),
        (r"-\text{5}", -5),
        ("minus 5", -5),
        ("The change is negative 5", -5),
        (r"\theta = 72^\circ", 72),
        (r"\sqrt{324} = 18", 18),
        ("5 times", 5),
        ("5 times a week", 5),
        ("$5 left over", 5),
        ("72 miles on the third day", 72),
        ("72 pages in one day", 72),
        ("72 in the first half", 72),
        ("Clips in May: 72", 72),
        ("Final score: 72", 72),
        ("72 is the final answer.", 72),
        ("72 of the apples", 72),
        ("seventy-two (72)", 72),
        ("so...72", 72),
    ],
)
def test_number_is_read(text: str, number: int | Fraction) -> None:
    assert parse_number(text) == number


@pytest.mark.parametrize(
    "text",
    ["", "apples", "48 + 24", "5-7", "3*4", "3 × 4", "3x4", "2^3", "5²", r"3 \times 4", "1/0", "1/2/3", "1,00", "12:30"]
    + [
        "1.000.000",
        "12,5,7",
        "1e999",
        "x2",
        "1e3e3",
        "5 or 7",
        "- 5 apples",
        "the square root of 7",
        "at least 5",
        "not 5",
    ]
    + ["#5", "Problem 3", "2. Add them", "1) Add", "less than 5", "one hundred 5", "up to 5", "isn't 5"]
    + NO_NUMBER,
)
def test_what_is_not_one_finished_number_is_none(text: str) -> None:
    assert parse_number(text) is None


@given(st.fractions(min_value=-(10**12), max_value=10**12))
def test_every_fraction_survives_being_written(value: Fraction) -> None:
    assert parse_number(str(value)) == value
