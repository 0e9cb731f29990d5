"""Limits of a judge and what it has started, as a sum."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from xrl.rewards.limits import JudgeLimits
from xrl.rewards.watch import Watch, newest_id

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")

# Says what it was told to hold, once it holds it.
CHILD = "import sys, time; held = b'x' * int(sys.argv[1]); print('ready', flush=True); time.sleep(600)"


@contextmanager
def children(*num_bytes: int) -> Iterator[None]:
    started = [
        subprocess.Popen([sys.executable, "-c", CHILD, str(count)], stdout=subprocess.PIPE, text=True)
        for count in num_bytes
    ]
    try:
        for child in started:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        yield
    finally:
        for child in started:
            child.kill()
            child.communicate(timeout=60)


def test_what_keeps_to_its_limits_may_go_on() -> None:
    watch = Watch(os.getpid(), JudgeLimits(memory_bytes=10**12, max_processes=100_000))
    with children(0, 0):
        assert watch.excess() is None
        assert watch.excess() is None
        assert Watch(os.getpid(), JudgeLimits()).excess() is None


def test_more_processes_are_noticed_at_once_and_those_that_ended_do_not_count() -> None:
    watch = Watch(os.getpid(), JudgeLimits(max_processes=2))
    with children(0, 0):
        assert watch.excess() is None
        with children(0):  # within the second after the whole table was read
            excess = watch.excess()
            assert excess is not None and excess.failure == "process limit"
            assert "3 processes" in excess.detail and "--judge-max-processes 2" in excess.detail
    assert watch.excess() is None


def test_memory_of_all_of_them_counts() -> None:
    with children(60_000_000, 60_000_000):
        assert Watch(os.getpid(), JudgeLimits(memory_bytes=400_000_000)).excess() is None
        excess = Watch(os.getpid(), JudgeLimits(memory_bytes=100_000_000)).excess()
    assert excess is not None and excess.failure == "memory limit"
    assert "--judge-memory-gb 0.1" in excess.detail


def test_system_numbers_processes_and_threads_one_after_the_other() -> None:
    before = newest_id()
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join(60)
    assert before > 0 and newest_id() != before
