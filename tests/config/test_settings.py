"""Settings of different sections that cannot be together."""

from __future__ import annotations

from pathlib import Path

import pytest

from xrl.config import Settings, SettingsError
from xrl.config.data import DataConfig
from xrl.config.model import ModelConfig
from xrl.config.rollout import SAMPLES_PER_PLACE, RolloutConfig
from xrl.config.run import EvaluationConfig


def settings(*, samples: int, eval_samples: int = 1, batch: int = 4) -> Settings:
    return Settings(
        model=ModelConfig(model=Path("model")),
        data=DataConfig(data=Path("data"), samples_per_prompt=samples),
        rollout=RolloutConfig(rollout_max_batch_size=batch),
        evaluation=EvaluationConfig(eval_samples_per_prompt=eval_samples),
    )


def test_more_answers_to_a_prompt_than_a_worker_takes_are_refused_at_the_start() -> None:
    most = SAMPLES_PER_PLACE * 4
    assert settings(samples=most, eval_samples=most).data.samples_per_prompt == most
    with pytest.raises(SettingsError, match=f"--samples-per-prompt {most + 1} is more than a worker takes"):
        settings(samples=most + 1)
    with pytest.raises(SettingsError, match=f"--eval-samples-per-prompt {most + 1} is more than a worker takes"):
        settings(samples=2, eval_samples=most + 1)
