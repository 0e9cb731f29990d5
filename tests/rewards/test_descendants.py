"""The processes below another one, and their end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from xrl.rewards.descendants import (
    Process,
    alive_below,
    alive_of_session,
    below,
    kill_all,
    read_process,
    read_processes,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")

# Starts a child, says its id, and both wait.
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def parent() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "MARK": "0123"},
    )
    yield process
    kill_all(lambda: alive_of_session(process.pid, b"MARK=0123"), limit_s=60)
    process.wait(60)


def child_of(parent: subprocess.Popen[str]) -> int:
    assert parent.stdout is not None
    return int(parent.stdout.readline())


def has_ended(pid: int) -> bool:
    process = read_process(pid)
    return process is None or process.state == "Z"


def test_this_process_is_what_the_system_says() -> None:
    me = read_process(os.getpid())
    assert me is not None
    assert (me.pid, me.parent, me.session) == (os.getpid(), os.getppid(), os.getsid(0))
    assert me.num_threads >= 1 and me.resident_bytes > 1_000_000 and me.state == "R"
    assert read_processes()[os.getpid()].parent == os.getppid()


def process(pid: int, parent: int) -> Process:
    return Process(pid=pid, state="S", parent=parent, session=1, num_threads=1, resident_bytes=0)


def test_children_of_children_are_below_and_a_circle_has_an_end() -> None:
    table = {pid: process(pid, parent) for pid, parent in [(2, 1), (3, 2), (4, 3), (5, 1), (6, 7), (7, 6)]}
    assert sorted(found.pid for found in below(2, table)) == [3, 4]
    assert sorted(found.pid for found in below(6, table)) == [6, 7]
    assert below(99, table) == []


def test_all_that_is_below_is_killed(parent: subprocess.Popen[str]) -> None:
    child = child_of(parent)
    assert alive_below(parent.pid) == [child]
    family = {parent.pid, child}
    assert family <= set(alive_below(os.getpid()))
    # Its parent dead, a child that is still on its way out is no longer below.
    assert kill_all(lambda: [pid for pid in family if not has_ended(pid)], limit_s=60)
    assert parent.wait(60) == -9
    assert has_ended(child)


def test_orphans_are_found_by_their_session_and_by_their_environment(parent: subprocess.Popen[str]) -> None:
    child = child_of(parent)
    parent.kill()
    assert set(alive_of_session(parent.pid, b"NO_SUCH_MARK=1")) - {parent.pid} == {child}
    assert set(alive_of_session(-1, b"MARK=0123")) - {parent.pid} == {child}


def test_what_cannot_be_killed_is_not_waited_for_without_end() -> None:
    with open(os.devnull) as nothing:
        assert not kill_all(lambda: [2**30], limit_s=0.02, reap=nothing.readline)


def test_no_such_process_is_none() -> None:
    assert read_process(2**30) is None
    assert not Path("/proc/1073741824").exists()
