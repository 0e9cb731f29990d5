"""The two rule judges of GSM8K."""

import pytest

from xrl.rewards.gsm8k import check_truth
from xrl.rewards.gsm8k import judge as tolerant
from xrl.rewards.gsm8k_exact import check_truth as check_exact_truth
from xrl.rewards.gsm8k_exact import judge as exact
from xrl.types import Prompt


def asking(ground_truth: str) -> Prompt:
    return Prompt(id=0, token_ids=[1], text="?", ground_truth=ground_truth)


@pytest.mark.parametrize(
    ("response", "tolerant_reward", "exact_reward"),
    [
        ("#### 72", 1, 1),
        ("#### 7,2", 0, 1),
        ("#### 5 #### 72", 1, 1),
        ("#### 72 #### 5", 0, 0),
        ("#### 72 apples", 1, 1),
        ("#### 72.", 1, 0),
        ("#### 72<|im_end|>", 1, 1),
        (r"\boxed{72 \text{ cm}^2}", 1, 0),
        ("#### 72万", 0, 1),
        ("#### $72", 1, 0),
        ("####72", 1, 0),
        ("#### 72.00", 1, 0),
        ("#### **72**", 1, 0),
        (r"\boxed{72}", 1, 0),
        ("72", 0, 0),
        ("#### -72", 0, 0),
        ("#### 72" + " and so on" * 40, 1, 0),
        ("", 0, 0),
    ],
)
def test_rewards(response: str, tolerant_reward: float, exact_reward: float) -> None:
    assert tolerant(response, asking("72")) == tolerant_reward
    assert exact(response, asking("72")) == exact_reward


@pytest.mark.parametrize("ground_truth", ["blue", "1, 2", r"\sqrt{7}", "2x+1", "Step 2", "nan"])
def test_ground_truth_that_is_no_number_is_refused(ground_truth: str) -> None:
    with pytest.raises(ValueError, match="is not a number: try --judge math-verify"):
        check_truth(asking(ground_truth))


@pytest.mark.parametrize("ground_truth", ["1,000", "$5", "72 ", "1/2", "72 apples"])
def test_ground_truth_that_no_text_equals_is_refused_by_the_exact_rule(ground_truth: str) -> None:
    check_truth(asking(ground_truth))
    with pytest.raises(ValueError, match="is not made of digits alone"):
        check_exact_truth(asking(ground_truth))


def test_ground_truth_that_is_no_number_is_an_error_not_a_zero() -> None:
    with pytest.raises(ValueError, match="'blue' is not a number"):
        tolerant("#### blue", asking("blue"))
