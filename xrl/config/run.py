"""The run itself: where it writes, how often, and how it is evaluated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from xrl.config.data import MOST_SAMPLES
from xrl.config.durations import duration_s
from xrl.config.errors import SettingsError
from xrl.config.numbers import LONGEST_S, check_at_most
from xrl.config.printable import shown
from xrl.config.rollout import TEMPERATURES

# Every wait of a run has an end.
MAX_SAVE_RETRY_MINUTES = 7 * 24 * 60
HANG_LIMIT_SCALES = 0.001, 100.0


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Output, intervals and the seed."""

    work_dir: Path = Path("work_dir")
    """Each run writes a folder of its own, named by its start time, below this one."""

    seed: int = 1234
    """Seeds data order and sampling; at most 2^62 either way."""

    log_interval: int = 1
    """Rollouts between console lines."""

    save_interval: int | None = None
    """Rollouts between Hugging Face checkpoints (hf-<step>); default: only hf-final."""

    save_keep: int | None = None
    """How many of the newest hf-<step> folders to keep; default: all."""

    # By default long enough to make room by hand, and short enough that nobody pays for GPUs that wait overnight.
    save_retry_minutes: float = 2.0
    """How long the end of a run goes on trying to write hf-final where it cannot be written (a full disk, say), before
    it gives up with exit code 1; 0: one try."""

    run_dir: Path | None = None
    """Folder of this run, shared by all attempts at it: one that was interrupted goes on from its newest saved state;
    default: a new folder below --work-dir."""

    state_interval: int | None = None
    """Rollouts between saved states (state/step-<N>), from which the run can go on as if it had not been interrupted;
    default: none."""

    state_keep: int = 2
    """How many of the newest saved states to keep."""

    resume: str = "auto"
    """auto: go on from the newest whole state in --run-dir, if there is one; never: refuse to where there is one; or
    the path of a state, or of a run's folder."""
    exit_before: str | None = None
    """Stop, with a saved state and exit code 75, before the job is that old (55m, 1h30m, 3300s), the save included:
    counted from SLURM_JOB_START_TIME where Slurm sets it, else from the start of xrl; default: no limit."""

    record_samples: bool = False
    """Write down what each step learns from (samples/step-<N>.safetensors), for `xrl replay`."""

    tensorboard: bool = True
    """Write TensorBoard events."""

    on_nothing_learned: Literal["warn", "stop"] = "stop"
    """What a run does when no rollout teaches it anything: warn after 3 in a row, and with stop end after 10 with exit
    code 1 (at the end of a shorter run too, if it has 3 rollouts and none taught it anything)."""

    hang_limit_scale: float = 1.0
    """Scales how long ranks may get nothing done, or be silent, before the run ends as one that hangs."""

    @property
    def output_dir(self) -> Path:
        """Where the run writes: its own folder, or the one in which it gets one."""
        return self.work_dir if self.run_dir is None else self.run_dir

    @property
    def output_flag(self) -> str:
        """How that is told on the command line."""
        return f"--work-dir {self.work_dir}" if self.run_dir is None else f"--run-dir {self.run_dir}"

    def __post_init__(self) -> None:
        if abs(self.seed) > 2**62:  # a rollout's own seed is a little further on, and must be a 64-bit number too
            raise SettingsError(f"--seed must be between -2^62 and 2^62, got {self.seed}")
        for name in ("log_interval", "save_interval", "save_keep", "state_interval", "state_keep"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"--{name.replace('_', '-')} must be >= 1, got {value}")
        if not 0 <= self.save_retry_minutes <= MAX_SAVE_RETRY_MINUTES:
            raise SettingsError(
                f"--save-retry-minutes must be between 0 and {MAX_SAVE_RETRY_MINUTES:,} (a week), got "
                f"{self.save_retry_minutes:g}"
            )
        low, high = HANG_LIMIT_SCALES
        if not low <= self.hang_limit_scale <= high:
            raise SettingsError(f"--hang-limit-scale must be in [{low:g}, {high:g}], got {self.hang_limit_scale:g}")
        if self.exit_before is not None and not 0 < (duration_s(self.exit_before) or 0) <= LONGEST_S:
            raise SettingsError(
                f"--exit-before needs a time such as 55m, 1h30m or 3300s, at most {LONGEST_S:,} s, found "
                f"{shown(self.exit_before)}"
            )

    @property
    def exit_before_s(self) -> float:
        """`exit_before` in seconds; infinity where there is no limit."""
        seconds = None if self.exit_before is None else duration_s(self.exit_before)
        return math.inf if seconds is None else float(seconds)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Pass rates on held-out prompts: before, during and after training."""

    eval_data: Path | None = None
    """JSONL or parquet file of evaluation prompts; default: no evaluation."""

    eval_interval: int | None = None
    """Rollouts between evaluations; default: only before and after."""

    eval_samples_per_prompt: int = 4
    """Sampled answers to each prompt: pass@1 is their mean, pass@k counts prompts with one right among k."""

    eval_temperature: float = 1.0
    """Temperature of the sampled answers; greedy answers are always scored too."""

    eval_max_prompts: int | None = None
    """Evaluate on only the first so many prompts; default: on all."""

    def __post_init__(self) -> None:
        for name in ("eval_interval", "eval_samples_per_prompt", "eval_max_prompts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"--{name.replace('_', '-')} must be >= 1, got {value}")
        check_at_most("--eval-samples-per-prompt", self.eval_samples_per_prompt, MOST_SAMPLES)
        low, high = TEMPERATURES
        if not low <= self.eval_temperature <= high:
            raise SettingsError(
                f"--eval-temperature must be > 0, in [{low:g}, {high:g}], got {self.eval_temperature:g}"
            )
