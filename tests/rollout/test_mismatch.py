"""What is said of answers whose log-probs are not the actor's; a whole run that ends so is in tests/e2e."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest

from xrl.config import RolloutConfig, SettingsError
from xrl.rollout.mismatch import MismatchBounds, MismatchFailed


def bounds(dtype: str = "float32", **settings: Any) -> MismatchBounds:
    return MismatchBounds(RolloutConfig(**settings), dtype=dtype)


def test_rounding_is_no_reason_to_speak(caplog: pytest.LogCaptureFixture) -> None:
    bounds().judge(3e-5, rollout=1)
    bounds("bfloat16").judge(0.03, rollout=1)
    assert not caplog.records


def test_a_mismatch_over_the_first_bound_warns(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="xrl"):
        bounds(mismatch_warn=0.1, mismatch_stop=1.0).judge(0.5, rollout=3)
    assert "rollout 3: log-probs" in caplog.text and "by 0.5 on average, more than --mismatch-warn 0.1" in caplog.text


@pytest.mark.parametrize("mismatch", [1.5, math.inf, math.nan])
def test_a_mismatch_over_the_second_bound_ends_the_run(mismatch: float) -> None:
    with pytest.raises(MismatchFailed, match="rollout 3: .* on average, more than --mismatch-stop 1: "):
        bounds(mismatch_stop=1.0).judge(mismatch, rollout=3)


@pytest.mark.parametrize(
    "settings",
    [
        {"partial_rollout": True},
        {"top_k": 5, "allow_biased_sampling": True},
        {"top_p": 0.9, "allow_biased_sampling": True},
    ],
)
def test_answers_that_differ_by_design_are_judged_by_given_bounds_alone(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    bounds(**settings).judge(3.0, rollout=1)
    assert not caplog.records
    with pytest.raises(MismatchFailed):
        bounds(mismatch_stop=1.0, **settings).judge(3.0, rollout=1)


@pytest.mark.parametrize("name", ["mismatch_warn", "mismatch_stop"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_a_bound_is_above_zero(name: str, value: float) -> None:
    with pytest.raises(SettingsError, match=f"--{name.replace('_', '-')} must be > 0"):
        RolloutConfig(**{name: value})  # type: ignore[arg-type]
