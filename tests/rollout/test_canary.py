"""What the canary says to differences between engine and actor; whole runs with it are in tests/e2e/test_workers.py."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace
from typing import cast

import pytest

from xrl.config import RolloutConfig
from xrl.rollout.canary import Canary, CanaryFailed
from xrl.rollout.pool import WorkerPool
from xrl.types import SamplingParams


@pytest.fixture
def canary() -> Canary:
    pool = cast(WorkerPool, SimpleNamespace(version=7))
    config = RolloutConfig(canary_warn=0.1, canary_stop=1.0)
    return Canary(pool, config, dtype="float32", vocab_size=100, max_model_len=64, sampling=SamplingParams())


def test_the_largest_difference_is_reported(canary: Canary, caplog: pytest.LogCaptureFixture) -> None:
    assert canary.judge([0.01, 0.05, 0.02]) == 0.05
    assert canary.judge([]) == 0.0
    assert not caplog.records


def test_a_difference_over_the_first_threshold_warns(canary: Canary, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="xrl"):
        assert canary.judge([0.5, 0.2]) == 0.5
    assert "weights version 7" in caplog.text and "--canary-warn 0.1" in caplog.text


def test_a_difference_over_the_second_threshold_ends_the_run(canary: Canary) -> None:
    with pytest.raises(CanaryFailed, match=r"differ from the actor's by 1.5 on average, more than --canary-stop 1"):
        canary.judge([0.0, 1.5])


@pytest.mark.parametrize("difference", [math.nan, math.inf])
def test_what_is_not_finite_ends_the_run_and_says_so(canary: Canary, difference: float) -> None:
    with pytest.raises(CanaryFailed, match="version 7 log-probs .* are not finite"):
        canary.judge([0.0, difference, 0.0])
