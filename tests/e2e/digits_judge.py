"""A judge under which every rollout has something to learn, whoever the student."""

from __future__ import annotations

from xrl.types import Prompt


def reward(response: str, prompt: Prompt) -> float:
    """The share of digits in the response."""
    return sum(character.isdigit() for character in response) / max(1, len(response))
