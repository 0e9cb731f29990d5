"""How answers are sampled, and by what."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from xrl.config.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Rollout engines and sampling."""

    engine: str = "embedded"
    """Row of the table in xrl/rollout."""

    rollout_python: Path | None = None
    """Interpreter that runs the workers, where the engine wants an environment of its own; left out: this one."""

    rollout_num_workers: int | None = None
    """Rollout worker processes, prompts are spread over them; left out: one a GPU, one on a CPU machine."""

    rollout_num_threads: int | None = None
    """CPU threads of each worker; left out: the machine's cores over the workers."""

    rollout_max_batch_size: int = 1024
    """Sequences one engine decodes at once; more wait their turn."""

    rollout_dtype: str = "auto"
    """Number format of the engine's weights: float32, bfloat16, or auto for the actor's."""

    rollout_timeout_s: float = 1800.0
    """A prompt unanswered for longer than this is retried, then counted as failed."""

    rollout_max_retries: int = 2
    """Tries after the first for a prompt whose request failed."""

    temperature: float = 1.0
    """Sampling temperature; the actor's log-probs use the same."""

    top_k: int = 0
    """Sample among the k likeliest tokens; 0 keeps all."""

    top_p: float = 1.0
    """Sample among the likeliest tokens that hold this share of the probability."""

    allow_biased_sampling: bool = False
    """Accept top-k or top-p filtering in training, knowing that the actor's ratio is then biased."""

    max_response_length: int = 1024
    """Longest answer in tokens."""

    ignore_eos: bool = False
    """Let every answer run to --max-response-length (for benchmarks)."""

    def __post_init__(self) -> None:
        for name in ("rollout_num_workers", "rollout_max_batch_size", "max_response_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"--{name.replace('_', '-')} must be >= 1, got {value}")
        if self.rollout_python is not None and not os.access(self.rollout_python, os.X_OK):
            raise SettingsError(
                f"--rollout-python {self.rollout_python} must be a Python interpreter, found none there"
            )
        if self.rollout_num_threads is not None and self.rollout_num_threads < 1:
            raise SettingsError(f"--rollout-num-threads must be >= 1, got {self.rollout_num_threads}")
        if self.rollout_dtype not in ("auto", "float32", "bfloat16"):
            raise SettingsError(f"--rollout-dtype must be auto, float32 or bfloat16, got {self.rollout_dtype!r}")
        if self.rollout_timeout_s <= 0 or self.rollout_max_retries < 0:
            raise SettingsError(
                f"--rollout-timeout-s must be > 0 and --rollout-max-retries >= 0, "
                f"got {self.rollout_timeout_s:g} and {self.rollout_max_retries}"
            )
        if self.temperature <= 0:
            raise SettingsError(f"--temperature must be > 0 in training, got {self.temperature:g}")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise SettingsError(f"--top-k must be >= 0 and --top-p in (0, 1], got {self.top_k} and {self.top_p:g}")
        if (self.top_k > 0 or self.top_p < 1) and not self.allow_biased_sampling:
            raise SettingsError(
                f"--top-k {self.top_k} --top-p {self.top_p:g} sample from a filtered distribution that the actor "
                f"does not score, so every ratio would be biased: use --top-k 0 --top-p 1, "
                f"or say --allow-biased-sampling"
            )
