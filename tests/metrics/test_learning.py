"""Whether a run learns anything, and when it is said that it does not."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from tests.metrics.learning_records import LEARNED, flat, record, seen
from xrl.metrics.learning import RolloutRecord, record_of

IDLE: dict[str, RolloutRecord] = {
    "flat": flat(),
    "empty": flat(num_empty=8),
    "too small": flat(num_failed=8, num_too_small=4, reward_mean=math.nan, reward_std=math.nan),
    "lr": record(lr=0.0, weights_changed=False),
    "gradient": record(grad_norm=0.0),
    "unchanged": record(weights_changed=False),
}


@pytest.mark.parametrize("cause", IDLE)
def test_each_way_to_learn_nothing_is_warned_of_at_the_third_rollout_and_ends_the_run_at_the_tenth(cause: str) -> None:
    assert IDLE[cause].cause == cause
    watch, warnings = seen([IDLE[cause]] * 9)
    assert [len(said) for said in warnings] == [0, 0, 1, 0, 0, 0, 0, 0, 0]
    assert watch.must_stop is None
    watch.see(IDLE[cause])
    assert watch.must_stop is not None and "the last 10 rollouts" in watch.must_stop


def test_one_rollout_that_teaches_something_begins_the_count_anew() -> None:
    watch, warnings = seen([*[flat()] * 9, LEARNED, *[flat()] * 9])
    assert watch.must_stop is None and watch.has_moved
    assert [place for place, said in enumerate(warnings, start=1) if said] == [3, 13]
    watch.see(flat())
    assert watch.must_stop is not None


def test_causes_that_take_turns_count_together() -> None:
    watch, warnings = seen([flat(), IDLE["lr"], IDLE["too small"], *[flat()] * 7])
    assert len(warnings[2]) == 1
    assert watch.must_stop is not None and "8 of them for this reason" in watch.must_stop


def test_run_that_is_only_to_be_warned_goes_on_and_hears_of_it_every_tenth_rollout() -> None:
    watch, warnings = seen([flat()] * 25, stops=False)
    assert [place for place, said in enumerate(warnings, start=1) if said] == [3, 10, 20]
    assert watch.must_stop is None
    verdict = watch.at_end()
    assert verdict is not None and not verdict.has_failed


@pytest.mark.parametrize(("num_rollouts", "has_failed"), [(1, False), (2, False), (3, True), (9, True), (10, True)])
def test_run_that_taught_nothing_at_all_has_failed_unless_that_may_be_chance(
    num_rollouts: int, has_failed: bool
) -> None:
    verdict = seen([flat()] * num_rollouts)[0].at_end()
    assert verdict is not None and verdict.has_failed == has_failed


def test_run_that_learned_once_has_not_failed() -> None:
    assert seen([LEARNED, *[flat()] * 9])[0].at_end() is None
    assert seen([flat(), flat(), LEARNED])[0].at_end() is None


def test_last_ten_rollouts_in_vain_are_said_at_the_end_too() -> None:
    verdict = seen([LEARNED, *[flat()] * 10])[0].at_end()
    assert verdict is not None and verdict.has_failed


def test_run_without_any_rollout_is_not_judged() -> None:
    assert seen([])[0].at_end() is None


@pytest.mark.parametrize("odd", [{"truncated_fraction": 1.0}, {"num_empty": 8}])
def test_what_is_odd_while_weights_change_is_said_once_and_never_ends_the_run(odd: dict[str, Any]) -> None:
    watch, warnings = seen([record(**odd)] * 30)
    assert [place for place, said in enumerate(warnings, start=1) if said] == [3]
    assert watch.must_stop is None and watch.at_end() is None


def test_gradient_that_was_not_measured_is_not_taken_for_0() -> None:
    assert record(grad_norm=None).cause is None


@pytest.mark.parametrize("grad_norm", [0.0, 1e-9, None])
def test_groups_without_a_difference_teach_nothing_whatever_else_changes_weights(grad_norm: float | None) -> None:
    flat_groups = record(num_flat=4, grad_norm=grad_norm)  # which were kept: --no-filter-zero-variance
    assert flat_groups.cause == "flat"
    watch, _ = seen([flat_groups] * 10)
    assert watch.must_stop is not None and watch.has_moved
    assert record(num_flat=3, num_too_small=1).cause == "flat"
    assert record(num_flat=3).cause is None and record(num_flat=2, num_too_small=1).cause is None


def test_every_second_rollout_may_be_flat() -> None:
    watch, warnings = seen([flat(), LEARNED] * 20)
    assert not any(warnings) and watch.must_stop is None and watch.at_end() is None


@pytest.mark.parametrize("reward", [0.1, 1 / 3, -7.3, 1e6 + 0.1])
def test_equal_rewards_are_equal_whatever_their_mean_was_rounded_to(reward: float) -> None:
    rounded = math.fsum([reward] * 7) / 7
    assert record(reward_mean=rounded, reward_std=abs(rounded - reward)).equal_rewards
    assert not record(reward_mean=reward, reward_std=0.01).equal_rewards


def test_rewards_of_nobody_are_not_equal() -> None:
    assert not IDLE["too small"].equal_rewards and not IDLE["too small"].all_truncated


def test_record_is_read_from_a_rollouts_metrics() -> None:
    metrics = {"samples/total": 8.0, "samples/failed": 2.0, "samples/empty": 1.0, "truncated_fraction": 0.5}
    metrics |= {"reward/mean": 0.25, "reward/std": 0.1, "updates": 2.0}
    metrics |= {"groups/total": 4.0, "groups/too_small": 1.0, "groups/flat": 2.0}
    found = record_of(7, metrics, lr=1e-5, grad_norm=0.3, weights_changed=True)
    assert found == RolloutRecord(
        rollout_id=7,
        num_answers=8,
        num_failed=2,
        num_empty=1,
        truncated_fraction=0.5,
        reward_mean=0.25,
        reward_std=0.1,
        num_groups=4,
        num_too_small=1,
        num_flat=2,
        num_updates=2,
        lr=1e-5,
        grad_norm=0.3,
        weights_changed=True,
    )


def test_weights_that_decay_in_vain_are_not_those_of_the_start() -> None:
    watch, _ = seen([record(grad_norm=0.0)] * 10)
    assert watch.must_stop is not None and watch.has_moved


@pytest.mark.parametrize("cause", ["flat", "empty", "too small", "lr", "unchanged"])
def test_weights_that_no_update_touched_are_those_of_the_start(cause: str) -> None:
    assert not seen([IDLE[cause]] * 10)[0].has_moved
    # In bf16 it cannot be seen whether weights changed.
    in_bf16 = dataclasses.replace(IDLE[cause], weights_changed=cause != "unchanged")
    assert not seen([in_bf16] * 10)[0].has_moved
