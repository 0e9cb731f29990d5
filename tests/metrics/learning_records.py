"""Records of rollouts, for tests of what is said about them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xrl.metrics.learning import LearningWatch, RolloutRecord
from xrl.metrics.learning_words import LearningWords

# A rollout of 4 groups of 2 answers from which something was learned.
LEARNED = RolloutRecord(
    rollout_id=1,
    num_answers=8,
    num_failed=0,
    num_empty=0,
    truncated_fraction=0.25,
    reward_mean=0.5,
    reward_std=0.5,
    num_groups=4,
    num_too_small=0,
    num_flat=0,
    num_updates=1,
    lr=1e-6,
    grad_norm=0.7,
    weights_changed=True,
)
WORDS = LearningWords(
    judge="mine.py:reward",
    max_response_length=32,
    ignore_eos=False,
    has_stop_tokens=True,
    trajectory=lambda rollout: Path(f"answers_{rollout}.jsonl"),
)


def record(**changes: Any) -> RolloutRecord:
    """That rollout, but for these."""
    return dataclasses.replace(LEARNED, **changes)


def flat(reward: float = 0.0, **changes: Any) -> RolloutRecord:
    """A rollout in which every answer got the same reward, so that no update was made."""
    nothing = {"num_flat": 4, "num_updates": 0, "lr": 0.0, "grad_norm": 0.0, "weights_changed": False}
    return record(**{"reward_mean": reward, "reward_std": 0.0, **nothing, **changes})


def seen(
    records: Sequence[RolloutRecord], *, stops: bool = True, words: LearningWords = WORDS
) -> tuple[LearningWatch, list[list[str]]]:
    """The watch after these rollouts, numbered from 1, and what it warned of after each."""
    watch = LearningWatch(words, stops=stops)
    numbered = [dataclasses.replace(each, rollout_id=number) for number, each in enumerate(records, start=1)]
    return watch, [watch.see(each) for each in numbered]
