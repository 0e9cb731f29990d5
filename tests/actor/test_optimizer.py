"""The learning rate of every update."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from xrl.actor.optimizer import build_schedule
from xrl.config import OptimizerConfig


def rates(num_updates: int, **settings: object) -> list[float]:
    """The learning rate of each of a run's updates, as a share of the highest."""
    config = OptimizerConfig(lr=3e-4, **settings)  # type: ignore[arg-type]
    optimizer = SimpleNamespace(param_groups=[{}])
    schedule = build_schedule(optimizer, config, num_updates=num_updates)  # type: ignore[arg-type]
    found = []
    for _ in range(num_updates):
        found.append(optimizer.param_groups[0]["lr"] / config.lr)
        schedule.step(increment=1)
    return found


def test_warm_up_begins_with_the_share_of_its_first_update():
    assert rates(6, lr_warmup_iters=4) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_warm_up_of_one_update_is_none():
    assert rates(3, lr_warmup_iters=1) == rates(3) == [1, 1, 1]


@pytest.mark.parametrize("num_updates", [1, 3])
def test_run_that_ends_within_its_warm_up_rises_no_faster(num_updates):
    shares = [(number + 1) / 10 for number in range(num_updates)]
    assert rates(num_updates, lr_warmup_iters=10, lr_decay_style="cosine") == pytest.approx(shares)


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_decay_begins_after_the_warm_up_and_leaves_the_last_update_something_to_learn_with(style):
    found = rates(12, lr_warmup_iters=4, lr_decay_style=style)
    assert found[3] == pytest.approx(1)
    assert found[3:] == sorted(found[3:], reverse=True)
    assert 0 < found[-1] < found[3]


def test_decay_without_warm_up_begins_at_the_highest_rate():
    assert rates(4, lr_decay_style="linear") == pytest.approx([1, 0.75, 0.5, 0.25])


def test_lowest_rate_is_reached_where_the_decay_ends():
    assert rates(6, lr_warmup_iters=2, lr_decay_style="linear", lr_decay_iters=4, min_lr=3e-5)[4:] == pytest.approx(
        [0.1, 0.1]
    )


def test_no_update_has_rate_0_while_the_highest_is_not():
    for num_updates in range(1, 12):
        for num_warmup in range(14):
            for style in ("constant", "linear", "cosine"):
                assert min(rates(num_updates, lr_warmup_iters=num_warmup, lr_decay_style=style)) > 0
