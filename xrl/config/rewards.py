"""Who judges the answers."""

from __future__ import annotations

from dataclasses import dataclass

from xrl.config.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """The judge and its bounds."""

    judge: str = "gsm8k"
    """Who gives an answer its reward; a function of your own may also be package.module:function."""

    judge_timeout_s: float = 10.0
    """An answer judged longer than this counts as failed, with reward 0."""

    judge_num_workers: int = 2
    """Processes that run judges which may hang (math-verify, your own)."""

    def __post_init__(self) -> None:
        if self.judge_timeout_s <= 0 or self.judge_num_workers < 1:
            raise SettingsError(
                f"--judge-timeout-s must be > 0 and --judge-num-workers >= 1, "
                f"got {self.judge_timeout_s:g} and {self.judge_num_workers}"
            )
