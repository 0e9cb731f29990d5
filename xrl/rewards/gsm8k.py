r"""Grade-school answers compared as numbers: `#### $1,000.00` is 1000."""

from __future__ import annotations

from xrl.rewards.answer import final_answer, parse_number
from xrl.types import Prompt


def judge(response: str, prompt: Prompt) -> float:
    r"""1 if the number after the last `####` (or in the last `\boxed{}`) equals the ground truth, else 0.

    Raises:
        ValueError: the ground truth is not a number.
    """
    expected = parse_number(prompt.ground_truth)
    if expected is None:
        raise ValueError(f"the ground truth {prompt.ground_truth!r} is not a number: try --judge math-verify")
    answer = final_answer(response)
    return float(answer is not None and parse_number(answer) == expected)
