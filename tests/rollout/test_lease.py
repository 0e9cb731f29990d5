"""One run at a time."""

from __future__ import annotations

import pytest

from xrl.rollout.access import WorkerInUse
from xrl.rollout.lease import LEASE_S, Lease


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_first_run_has_it_until_it_gives_it_back() -> None:
    lease = Lease(clock=Clock())
    assert lease.take("a")
    assert not lease.take("a")
    with pytest.raises(WorkerInUse, match=r"in use by run a since \d\d:\d\d:\d\d"):
        lease.take("b")
    lease.give_back("b")  # not its own to give
    with pytest.raises(WorkerInUse):
        lease.check_free_for("b")
    lease.give_back("a")
    assert lease.take("b")
    with pytest.raises(WorkerInUse, match="by run b"):
        lease.take("a")


def test_run_that_falls_silent_loses_it_to_the_next_that_asks() -> None:
    clock = Clock()
    lease = Lease(clock=clock)
    lease.take("a")
    for _ in range(5):  # a word now and then is enough
        clock.now += LEASE_S - 1
        lease.check_free_for("a")
    clock.now += LEASE_S - 1
    with pytest.raises(WorkerInUse, match="1 s from now"):
        lease.take("b")
    clock.now += 2
    assert not lease.take("a")  # nobody has asked: it is still its own
    clock.now += LEASE_S + 1
    assert lease.take("b")


def test_to_ask_takes_nothing() -> None:
    lease = Lease(clock=Clock())
    lease.check_free_for("a")
    assert lease.take("b")
