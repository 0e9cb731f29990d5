"""Who judges the answers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from xrl.config.errors import SettingsError
from xrl.config.numbers import LONGEST_S, check_at_most

# More processes than this wait for each other, whatever a judge does.
MOST_WORKERS, MOST_WORKERS_A_CORE = 256, 8
# Of gigabytes and of processes: beyond all machines.
MOST_OF_A_LIMIT = 1_000_000


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

    judge_memory_gb: float | None = 2.0
    """Memory of each such process, in GB of 1e9 bytes, and of all that it has started; null: no limit."""

    judge_max_processes: int | None = 64
    """Processes that each of them may be, with all it has started, and 16 times so many threads; null: no limit."""

    judge_max_file_gb: float | None = 1.0
    """Size of a file that a judge writes, in GB; null: no limit."""

    judge_env: str | None = None
    """Variables of the environment that the judge needs besides those that every program needs: NAME,NAME. It gets no
    others, keys and tokens least of all."""

    def __post_init__(self) -> None:
        check_at_most("--judge-timeout-s", self.judge_timeout_s, LONGEST_S)
        if self.judge_timeout_s <= 0 or self.judge_num_workers < 1:
            raise SettingsError(
                f"--judge-timeout-s must be > 0 and --judge-num-workers >= 1, "
                f"got {self.judge_timeout_s:g} and {self.judge_num_workers}"
            )
        most = max(MOST_WORKERS, MOST_WORKERS_A_CORE * (os.cpu_count() or 1))
        if self.judge_num_workers > most:
            raise SettingsError(
                f"--judge-num-workers must be at most {most} on this machine, got {self.judge_num_workers}"
            )
        for name in ("judge_memory_gb", "judge_max_file_gb", "judge_max_processes"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= MOST_OF_A_LIMIT:
                raise SettingsError(
                    f"--{name.replace('_', '-')} must be > 0 and at most {MOST_OF_A_LIMIT:,}, or null for no limit, "
                    f"got {value:g}"
                )
        for name in self.judge_variables:
            if "=" in name:
                raise SettingsError(
                    f"--judge-env takes names of variables, whose values are those of the environment, "
                    f"got a value for {name.partition('=')[0]}"
                )
            if name not in os.environ:
                raise SettingsError(f"--judge-env {name}: the environment has no such variable")

    @property
    def judge_variables(self) -> list[str]:
        """The names in --judge-env."""
        return [name.strip() for name in (self.judge_env or "").split(",") if name.strip()]
