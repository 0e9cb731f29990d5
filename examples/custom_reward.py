"""A reward of your own: right answers count, and short ones count a little more.

    xrl train --judge examples/custom_reward.py:reward ...

The function gets the answer's text and its prompt: `prompt.ground_truth`, `prompt.data_source`, and the data
row's `extra_info` as `prompt.extra`. It returns one finite number. Each call runs in a process of its own pool,
is ended after --judge-timeout-s, and counts as failed, with reward 0, when it raises or is ended. Put slow
set-up (reading a word list, say) at the top level: it runs once a process, and is not timed.
"""

from __future__ import annotations

from xrl.rewards.answer import final_answer, parse_number
from xrl.types import Prompt

FREE_CHARS = 200
LENGTH_PENALTY = 0.2


def reward(response: str, prompt: Prompt) -> float:
    """1 for the right number, up to 0.2 less as the answer grows beyond 200 characters; else 0."""
    answer = final_answer(response)
    if answer is None or parse_number(answer) != parse_number(prompt.ground_truth):
        return 0.0
    excess = max(0, len(response) - FREE_CHARS) / FREE_CHARS
    return 1.0 - LENGTH_PENALTY * min(1.0, excess)
