"""Limits of a judge and what it has started, as a sum."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from xrl.rewards.limits import JudgeLimits
from xrl.rewards.watch import LONGEST_PAUSE_S, SHORTEST_PAUSE_S, Watch, newest_id

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")

# For each number it reads it starts a child that holds so many bytes; for an empty line it ends them all, and goes on
# when they have ended but still stand in the process table.
PARENT = """
import os, subprocess, sys
CHILD = "import sys, time; held = b'x' * int(sys.argv[1]); print('ready', flush=True); time.sleep(3600)"
children = []
for line in sys.stdin:
    if line.strip():
        children.append(subprocess.Popen([sys.executable, "-c", CHILD, line.strip()], stdout=subprocess.PIPE))
        children[-1].stdout.readline()
    else:
        ended = []
        while children:
            ended.append(children.pop())
            ended[-1].kill()
            os.waitid(os.P_PID, ended[-1].pid, os.WEXITED | os.WNOWAIT)
    print("done", flush=True)
"""


class Family:
    """A process whose children come and go."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def watch(self, **limits: int) -> Watch:
        return Watch(self.process.pid, JudgeLimits(**limits))

    def start(self, *num_bytes: int) -> None:
        for count in num_bytes:
            self._tell(str(count))

    def end_all(self) -> None:
        self._tell("")

    def _tell(self, line: str) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(line, file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "done\n"


@pytest.fixture
def family() -> Iterator[Family]:
    family = Family()
    yield family
    family.end_all()
    family.process.communicate(timeout=60)


def test_what_keeps_to_its_limits_may_go_on(family: Family) -> None:
    family.start(0, 0)
    watch = family.watch(memory_bytes=10**12, max_processes=2)
    assert watch.excess() is None
    assert watch.excess() is None
    assert family.watch().excess() is None


def test_more_processes_are_noticed_at_once_and_those_that_ended_do_not_count(family: Family) -> None:
    watch = family.watch(max_processes=2)
    family.start(0, 0)
    assert watch.excess() is None
    family.start(0)  # within the second after the whole table was read
    excess = watch.excess()
    assert excess is not None and excess.failure == "process limit"
    assert "3 processes" in excess.detail and "--judge-max-processes 2" in excess.detail
    family.end_all()
    assert watch.excess() is None


def test_memory_of_all_of_them_counts(family: Family) -> None:
    family.start(60_000_000, 60_000_000)
    assert family.watch(memory_bytes=400_000_000).excess() is None
    excess = family.watch(memory_bytes=100_000_000).excess()
    assert excess is not None and excess.failure == "memory limit"
    assert "--judge-memory-gb 0.1" in excess.detail


def test_looks_become_rare_where_nothing_happens(family: Family) -> None:
    watch = family.watch(max_processes=2)
    pauses = []
    for _ in range(200):
        watch.excess()
        pauses.append(watch.pause_s)
    assert min(pauses) == SHORTEST_PAUSE_S and max(pauses) <= LONGEST_PAUSE_S
    family.start(0)
    watch.excess()
    assert watch.pause_s == SHORTEST_PAUSE_S


def test_system_numbers_processes_and_threads_one_after_the_other() -> None:
    before = newest_id()
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join(60)
    assert before > 0 and newest_id() != before
