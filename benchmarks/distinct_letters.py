"""The reward of the step benchmark: cheap, never constant, the same function for every contestant."""

from __future__ import annotations

from xrl.types import Prompt


def distinct_letters(response: str) -> float:
    """Number of different characters in an answer, in hundreds."""
    return len(set(response)) / 100


def judge(response: str, prompt: Prompt) -> float:
    """The same, as xrl calls a judge."""
    return distinct_letters(response)
