r"""Mathematical expressions compared by math-verify: `\frac{\sqrt{8}}{2}` is `\sqrt{2}`.

math-verify can take seconds or hang, on power towers for one, and its own time-outs need the main thread
of a process: they are off, and the pool bounds this judge from outside.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction

from math_verify import parse, verify

from xrl.rewards.answer import final_answer, parse_number
from xrl.types import Prompt

# Digits and what is written around them; with anything else, math-verify decides.
PLAIN_NUMBER = re.compile(r"[-+$%*`\d.,/ ]+(?:[eE][+-]?\d+)?[*`$%. ]*")

# It warns of the time-outs that are off at each call.
logging.getLogger("math_verify").setLevel(logging.ERROR)


def judge(response: str, prompt: Prompt) -> float:
    r"""1 if the final answer is mathematically equal to the ground truth, else 0.

    Only what follows the last `####` (or stands in the last `\boxed{}`) counts where there is such a thing:
    math-verify by itself takes "12 apples. #### 24" for 12.

    Raises:
        ValueError: the ground truth cannot be read.
    """
    answer = final_answer(response)
    expected, said = _plain_number(prompt.ground_truth), _plain_number(answer or "")
    # It reads 1e3 as 3 times Euler's number: plain numbers are compared here.
    if expected is not None and said is not None:
        return float(said == expected)
    gold = parse(_as_maths(prompt.ground_truth), parsing_timeout=None, raise_on_error=True)
    if not gold:
        raise ValueError(f"math-verify cannot read the ground truth {prompt.ground_truth!r}")
    found = parse(response if answer is None else _as_maths(answer), parsing_timeout=None)
    return float(verify(gold, found, timeout_seconds=None, raise_on_error=True))


def _plain_number(text: str) -> Fraction | None:
    return parse_number(text) if PLAIN_NUMBER.fullmatch(text) else None


def _as_maths(text: str) -> str:
    """LaTeX in the delimiters that math-verify looks for."""
    text = text.strip("*` ")
    return text if any(delimiter in text for delimiter in ("$", r"\(", r"\[", r"\boxed")) else f"${text}$"
