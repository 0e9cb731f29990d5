"""Where prompts come from and how they are batched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from xrl.config.errors import SettingsError
from xrl.config.numbers import check_at_most

# Of one prompt: an engine is asked for all of them at once.
MOST_SAMPLES = 65_536


@dataclass(frozen=True, kw_only=True)
class PackingConfig:
    """How samples are put into micro-batches: what the actor needs of `DataConfig`."""

    max_tokens_per_microbatch: int = 8192  # of a packed micro-batch
    micro_batch_size: int | None = None  # samples in a padded micro-batch; None: they are packed
    share_prompt_prefix: bool | None = None  # compute a prompt once for all its answers; None: where it can be


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training prompts and batch sizes."""

    data: Path
    """JSONL or parquet file of training prompts (made by `xrl gsm8k`, say)."""

    num_rollouts: int | None = None
    """Rollouts to train for; default: as many as --num-epochs take."""

    num_epochs: int = 1
    """Passes over the data, where --num-rollouts is not given."""

    rollout_batch_size: int = 128
    """Prompts in a rollout."""

    samples_per_prompt: int = 8
    """Answers drawn for each prompt (the group that advantages compare)."""

    max_prompt_length: int = 512
    """Longest prompt in tokens; longer ones are dropped and counted."""

    micro_batch_size: int | None = None
    """Samples in a padded micro-batch; default: samples are packed up to --max-tokens-per-microbatch."""

    max_tokens_per_microbatch: int = 8192
    """Token budget of a packed micro-batch; a single sample may not exceed it."""

    share_prompt_prefix: bool | None = None
    """Compute each prompt once for all its answers; default: yes with our own layers, no with transformer-engine."""

    shuffle: bool = True
    """Shuffle the prompts anew each epoch, seeded by --seed."""

    @property
    def packing(self) -> PackingConfig:
        """What the actor needs of these."""
        return PackingConfig(
            max_tokens_per_microbatch=self.max_tokens_per_microbatch,
            micro_batch_size=self.micro_batch_size,
            share_prompt_prefix=self.share_prompt_prefix,
        )

    def __post_init__(self) -> None:
        for name in (
            "num_rollouts",
            "num_epochs",
            "rollout_batch_size",
            "max_prompt_length",
            "micro_batch_size",
            "max_tokens_per_microbatch",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"--{name.replace('_', '-')} must be >= 1, got {value}")
        check_at_most("--samples-per-prompt", self.samples_per_prompt, MOST_SAMPLES)
        if self.samples_per_prompt < 2:
            raise SettingsError(f"--samples-per-prompt must be >= 2 to form a group, got {self.samples_per_prompt}")
