"""The math-verify judge, and the traps it avoids."""

import pytest

from xrl.rewards.math_verify import judge
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
    ],
)
def test_rewards(ground_truth: str, response: str, reward: float) -> None:
    assert judge(response, Prompt(id=0, token_ids=[1], text="?", ground_truth=ground_truth)) == reward
