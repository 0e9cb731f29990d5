r"""Grade-school answers compared as numbers: `#### $1,000.00` is 1000."""

from __future__ import annotations

from xrl.rewards.answer import final_answer
from xrl.rewards.number import parse_number, read_number
from xrl.types import Prompt


def judge(response: str, prompt: Prompt) -> float:
    r"""1 if the number after the last `####` (or in the last `\boxed{}`) equals the ground truth, else 0.

    Raises:
        ValueError: as `check_truth` does.
    """
    check_truth(prompt)
    answer = final_answer(response, prompt)
    return float(answer is not None and parse_number(answer) == read_number(prompt.ground_truth))


def check_truth(prompt: Prompt) -> None:
    """Refuse a ground truth with which no answer could be compared.

    Raises:
        ValueError: it is not a number.
    """
    if read_number(prompt.ground_truth) is None:
        raise ValueError(f"the ground truth {prompt.ground_truth!r} is not a number: try --judge math-verify")
