"""All sections together, and the checks that cross them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from xrl.config.algorithm import AlgorithmConfig
from xrl.config.data import DataConfig
from xrl.config.errors import SettingsError
from xrl.config.model import ModelConfig
from xrl.config.optimizer import OptimizerConfig
from xrl.config.parallel import ParallelConfig
from xrl.config.rewards import RewardConfig
from xrl.config.rollout import SAMPLES_PER_PLACE, RolloutConfig
from xrl.config.run import EvaluationConfig, RunConfig


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of a run, checked."""

    model: ModelConfig
    data: DataConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    rewards: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def prompts_in_flight(self) -> int:
        """Prompts that a rollout works on at once."""
        factor = self.rollout.oversampling if self.rollout.partial_rollout else 1.0
        return math.ceil(self.data.rollout_batch_size * factor)

    @property
    def longest_wait_s(self) -> float:
        """Seconds without progress on rank 0 after which one of its own time-outs has said why."""
        rollout = self.rollout
        return (
            (rollout.rollout_max_retries + 1) * rollout.rollout_timeout_s
            + 2 * rollout.weight_sync_timeout_s
            + self.rewards.judge_timeout_s
            + 60 * self.parallel.distributed_timeout_minutes
            + 60 * self.run.save_retry_minutes
        )

    def __post_init__(self) -> None:
        longest = self.data.max_prompt_length + self.rollout.max_response_length
        if self.data.micro_batch_size is None and self.data.max_tokens_per_microbatch < longest:
            raise SettingsError(
                f"--max-tokens-per-microbatch {self.data.max_tokens_per_microbatch} is less than --max-prompt-length + "
                f"--max-response-length = {longest}: one sample must fit into a micro-batch"
            )
        if self.algorithm.updates_per_rollout > self.data.rollout_batch_size:
            raise SettingsError(
                f"--updates-per-rollout {self.algorithm.updates_per_rollout} must not exceed --rollout-batch-size "
                f"{self.data.rollout_batch_size}: each update needs a group of its own"
            )
        most = SAMPLES_PER_PLACE * self.rollout.rollout_max_batch_size
        for name, count in (
            ("--samples-per-prompt", self.data.samples_per_prompt),
            ("--eval-samples-per-prompt", self.evaluation.eval_samples_per_prompt),
        ):
            if count > most:
                raise SettingsError(
                    f"{name} {count} is more than a worker takes at a time, {SAMPLES_PER_PLACE} x "
                    f"--rollout-max-batch-size {self.rollout.rollout_max_batch_size} = {most}"
                )
        if self.evaluation.eval_interval is not None and self.evaluation.eval_data is None:
            raise SettingsError("--eval-interval needs --eval-data")
