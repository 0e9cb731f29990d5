"""How long ranks may be silent or get nothing done."""

from __future__ import annotations

import typing
from pathlib import Path

import pytest

from xrl.config import Settings, SettingsError
from xrl.config.data import DataConfig
from xrl.config.model import ModelConfig
from xrl.config.rollout import RolloutConfig
from xrl.config.run import RunConfig
from xrl.launch.limits import GRACE_S, LEAST_SILENCE_S, MORE_S, Limits
from xrl.launch.progress import PhaseKind


def settings(scale: float = 1.0, rollout_timeout_s: float = 1800.0) -> Settings:
    return Settings(
        model=ModelConfig(model=Path("model")),
        data=DataConfig(data=Path("rows.jsonl")),
        rollout=RolloutConfig(rollout_timeout_s=rollout_timeout_s),
        run=RunConfig(hang_limit_scale=scale),
    )


def test_every_phase_has_a_limit() -> None:
    assert set(MORE_S) == set(typing.get_args(PhaseKind))


def test_no_phase_ends_before_the_time_outs_of_what_is_waited_for() -> None:
    for timeout_s in (1.0, 1800.0, 90_000.0):
        run = settings(rollout_timeout_s=timeout_s)
        assert min(Limits.of(run).phases.values()) >= run.longest_wait_s + GRACE_S


def test_one_flag_scales_them_all_and_leaves_time_for_three_beats() -> None:
    whole, half = Limits.of(settings()), Limits.of(settings(0.5))
    assert half.silence_s == whole.silence_s / 2
    assert half.phases == {kind: limit / 2 for kind, limit in whole.phases.items()}
    assert Limits.of(settings(0.001)).silence_s == LEAST_SILENCE_S


@pytest.mark.parametrize("scale", [0.0, -1.0, 1000.0, float("nan")])
def test_a_scale_that_is_none_is_refused(scale: float) -> None:
    with pytest.raises(SettingsError, match=r"--hang-limit-scale must be in \[0.001, 100\], got "):
        settings(scale)
