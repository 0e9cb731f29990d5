"""Who judges the answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from xrl.config.errors import SettingsError
from xrl.config.numbers import LONGEST_S, check_at_most


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """The judge and its bounds."""

    judge: str = "gsm8k"
    """Who gives an answer its reward; a function of your own may also be package.module:function."""

    judge_timeout_s: float = 10.0
    """The judge has failed on an answer that it judges longer than this."""

    judge_num_workers: int = 2
    """Processes that run judges which may hang (math-verify, your own)."""

    judge_failed: Literal["leave-out", "zero"] = "leave-out"
    """What becomes of an answer whose judge raised, ran out of time, died or gave no finite number: `leave-out` takes
    it out of its group, so that it moves no mean and is not trained on; `zero` gives it reward 0."""

    def __post_init__(self) -> None:
        check_at_most("--judge-timeout-s", self.judge_timeout_s, LONGEST_S)
        if self.judge_timeout_s <= 0 or self.judge_num_workers < 1:
            raise SettingsError(
                f"--judge-timeout-s must be > 0 and --judge-num-workers >= 1, "
                f"got {self.judge_timeout_s:g} and {self.judge_num_workers}"
            )
