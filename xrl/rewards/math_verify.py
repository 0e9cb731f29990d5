r"""Mathematical expressions compared by math-verify: `\frac{\sqrt{8}}{2}` is `\sqrt{2}`.

math-verify can take seconds or hang, on power towers for one, and its own time-outs need the main thread
of a process: they are off, and the pool bounds this judge from outside.
"""

from __future__ import annotations

import logging

from math_verify import parse, verify

from xrl.rewards.answer import final_answer, without_thinking
from xrl.rewards.number import parse_number, read_number
from xrl.types import Prompt

# It warns of the time-outs that are off at each call.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def judge(response: str, prompt: Prompt) -> float:
    r"""1 if the final answer is mathematically equal to the ground truth, else 0.

    Only what follows the last `####` (or stands in the last `\boxed{}`) counts where there is such a thing:
    math-verify by itself takes "12 apples. #### 24" for 12.

    Raises:
        ValueError: the ground truth cannot be read.
    """
    said = without_thinking(response, prompt)
    if said is None:
        return 0.0
    answer = final_answer(response, prompt)
    # It reads 1e3 as 3 times Euler's number: where both are one number as a whole, they are compared here.
    expected, found = read_number(prompt.ground_truth), None if answer is None else parse_number(answer)
    if answer is not None and expected is not None and found is not None:
        if found == expected:
            return 1.0
        if "%" not in answer + prompt.ground_truth:  # 50% may be 50 and may be 0.5
            return 0.0
    gold = _parse_truth(prompt.ground_truth)
    answers = parse(said if answer is None else _as_maths(answer), parsing_timeout=None)
    return float(verify(gold, answers, timeout_seconds=None, raise_on_error=True))


def check_truth(prompt: Prompt) -> None:
    """Refuse a ground truth with which no answer could be compared.

    Raises:
        ValueError: neither is it a number nor can math-verify read it.
    """
    if read_number(prompt.ground_truth) is None:
        _parse_truth(prompt.ground_truth)


def _parse_truth(text: str) -> list[object]:
    if text.strip("*`$ ").lower() == "nan":  # a value that was missing in a table, not n times a times n
        raise ValueError(f"the ground truth {text!r} is no value, and no answer equals it")
    found: list[object] = parse(_as_maths(text), parsing_timeout=None, raise_on_error=True)
    if not found:
        raise ValueError(f"math-verify cannot read the ground truth {text!r}")
    return found


def _as_maths(text: str) -> str:
    """LaTeX in the delimiters that math-verify looks for."""
    text = text.strip("*` ")
    return text if any(delimiter in text for delimiter in ("$", r"\(", r"\[", r"\boxed")) else f"${text}$"
