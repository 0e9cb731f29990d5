"""A reward of your own: right answers count, and short ones count a little more.

    xrl train --judge examples/custom_reward.py:reward ...

The function gets the answer's text and its prompt: `prompt.ground_truth`, `prompt.data_source`, and the data
row's `extra_info` as `prompt.extra`. It returns one finite number, or None where it cannot say. Each call runs in a
process of its own pool and is ended after --judge-timeout-s; the answer is left out when the call raises or is ended.
`check_truth`, where there is one, is asked about every row of the data before the run starts. Put slow set-up, such as
reading a word list, at the top level: it runs once a process, and is not timed.
"""

from __future__ import annotations

from xrl.rewards.answer import final_answer
from xrl.rewards.number import parse_number, read_number
from xrl.types import Prompt

FREE_CHARS = 200
LENGTH_PENALTY = 0.2


def reward(response: str, prompt: Prompt) -> float:
    """1 for the right number, up to 0.2 less as the answer grows beyond 200 characters; else 0."""
    answer = final_answer(response, prompt)
    if answer is None or parse_number(answer) != read_number(prompt.ground_truth):
        return 0.0
    excess = max(0, len(response) - FREE_CHARS) / FREE_CHARS
    return 1.0 - LENGTH_PENALTY * min(1.0, excess)


def check_truth(prompt: Prompt) -> None:
    """Refuse a row whose ground truth is not a number."""
    if read_number(prompt.ground_truth) is None:
        raise ValueError(f"the ground truth {prompt.ground_truth!r} is not a number")
