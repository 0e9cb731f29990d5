"""A judge that hangs."""

from __future__ import annotations

import time

from xrl.types import Prompt


def reward(response: str, prompt: Prompt) -> float:
    time.sleep(3600)
    return 0.0
