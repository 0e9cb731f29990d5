"""The rule of the reference implementations, character by character, for comparison with their figures."""

from __future__ import annotations

import re

from xrl.types import Prompt

TAIL_CHARS = 300
PATTERN = re.compile(r"#### (-?[0-9.,]+)")
# What PATTERN finds, commas dropped.
COMPARABLE = re.compile(r"-?[0-9.]+")


def judge(response: str, prompt: Prompt) -> float:
    """1 if the last `#### <number>` of the last 300 characters, commas dropped, is the ground truth as text."""
    found = PATTERN.findall(response[-TAIL_CHARS:])
    return float(bool(found) and found[-1].replace(",", "") == prompt.ground_truth)


def check_truth(prompt: Prompt) -> None:
    """Refuse a ground truth that no answer can equal.

    Raises:
        ValueError: it holds more than digits, a dot and a minus sign.
    """
    if not COMPARABLE.fullmatch(prompt.ground_truth):
        raise ValueError(
            f"the ground truth {prompt.ground_truth!r} is not made of digits alone, so that --judge gsm8k-exact finds "
            f"no answer equal to it: try --judge gsm8k"
        )
