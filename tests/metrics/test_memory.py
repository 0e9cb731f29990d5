"""Memory of a process tree."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from xrl.metrics.memory import PeakMemory, cuda_peak_bytes, peak_rss_bytes, pss_bytes, rss_bytes

MEBIBYTE = 2**20
# Takes 64 MiB, says so, and waits for its input to end.
CHILD = "import sys; block = bytearray(b'x') * (64 << 20); print('ready', flush=True); sys.stdin.read()"


@pytest.fixture
def child():
    process = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.communicate()


@pytest.mark.parametrize("measure", [peak_rss_bytes, rss_bytes, pss_bytes])
def test_a_process_with_64_mib_shows_at_least_those(child, measure):
    assert 64 * MEBIBYTE < measure(child.pid) < 512 * MEBIBYTE


def test_children_are_counted_with_their_parent(child):
    own_and_child = rss_bytes()
    child_alone = rss_bytes(child.pid)
    child.communicate()
    assert rss_bytes() < own_and_child - child_alone / 2


def test_a_process_that_is_gone_takes_nothing(child):
    child.communicate()
    assert rss_bytes(child.pid) == 0


def test_peak_is_kept_after_the_memory_is_given_back():
    block = bytearray(b"x") * (64 * MEBIBYTE)
    with_block = peak_rss_bytes(os.getpid())
    del block
    assert peak_rss_bytes(os.getpid()) >= with_block - 16 * MEBIBYTE


def test_watcher_keeps_the_highest_sum_it_saw(child):
    with PeakMemory(rss_bytes, pid=child.pid, interval_s=0.01) as peak:
        child.communicate()
    assert peak.bytes > 64 * MEBIBYTE


def test_watcher_takes_a_last_look_at_the_end():
    values = iter([1, 5])
    with PeakMemory(lambda pid: next(values), interval_s=3600) as peak:
        pass
    assert peak.bytes == 5


def test_no_cuda_device_takes_no_cuda_memory():
    assert (cuda_peak_bytes() > 0) <= torch.cuda.is_available()
