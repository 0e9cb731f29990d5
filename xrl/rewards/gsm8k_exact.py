"""The rule of the reference implementations, character by character, for comparison with their figures."""

from __future__ import annotations

import re

from xrl.types import Prompt

TAIL_CHARS = 300
PATTERN = re.compile(r"#### (-?[0-9.,]+)")


def judge(response: str, prompt: Prompt) -> float:
    """1 if the last `#### <number>` of the last 300 characters, commas dropped, is the ground truth as text."""
    found = PATTERN.findall(response[-TAIL_CHARS:])
    return float(bool(found) and found[-1].replace(",", "") == prompt.ground_truth)
