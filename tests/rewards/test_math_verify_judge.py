"""The math-verify judge, and the traps it avoids."""

import pytest

from xrl.rewards.math_verify import check_truth, judge
from xrl.types import Prompt


@pytest.mark.parametrize(
    ("ground_truth", "response", "reward"),
    [
        ("12", "answer 12 apples. #### 24", 0),  # math-verify alone: 1
        ("1000", "#### 1e3", 1),  # math-verify alone: 0
        ("72", "#### 72 apples", 1),
        ("72", "#### **72**", 1),
        (r"\sqrt{2}", r"#### \frac{\sqrt{8}}{2}", 1),
        ("1/2", r"\boxed{\frac12}", 1),
        ("1+x^2", "#### $x^2+1$", 1),
        (r"2\pi", "#### 2", 0),
        ("2", r"#### 2\pi", 0),
        ("72", "The answer is 72.", 1),
        ("72", r"#### {{{\frac{", 0),
        ("72", "", 0),
        # A list is not its first number, whichever side it is on.
        ("1, 2", r"\boxed{1}", 0),
        ("1, 2", r"\boxed{1, 3}", 0),
        ("1, 2", r"\boxed{2, 1}", 1),
        ("0, 1, 2", "#### 0", 0),
        ("1/2, 3/4", "#### 1/2", 0),
        ("3", "#### 3 4", 0),
        ("5", "#### 5, 7", 0),
        # What the reader of numbers knows and the library does not.
        ("18", r"\boxed{\$18}", 1),
        ("1234", r"\boxed{1\,234}", 1),
        ("5", "#### about 5", 1),
        ("5", "#### 5 (five)", 1),
        ("0.5", r"\boxed{50\%}", 1),
        ("50", r"\boxed{50\%}", 1),
        # Thinking is no answer.
        ("4", r"<think>\boxed{4}</think> It is \boxed{5}.", 0),
        ("4", r"<think>It is \boxed{4}", 0),
    ],
)
def test_rewards(ground_truth: str, response: str, reward: float) -> None:
    assert judge(response, Prompt(id=0, token_ids=[1], text="?", ground_truth=ground_truth)) == reward


def test_ground_truth_that_cannot_be_read_is_refused() -> None:
    check_truth(Prompt(id=0, token_ids=[], text="", ground_truth=r"\frac{\sqrt{3}}{2}"))
    with pytest.raises(ValueError, match="cannot read the ground truth"):
        check_truth(Prompt(id=0, token_ids=[], text="", ground_truth=r"\text{}"))


@pytest.mark.parametrize("missing", ["nan", "NaN", " nan ", "$nan$"])
def test_a_value_that_was_missing_in_a_table_is_no_product_of_letters(missing: str) -> None:
    prompt = Prompt(id=0, token_ids=[], text="", ground_truth=missing)
    with pytest.raises(ValueError, match="is no value"):
        check_truth(prompt)
    with pytest.raises(ValueError, match="is no value"):
        judge(r"\boxed{n^2a}", prompt)
