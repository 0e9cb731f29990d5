"""A process whose parent is gone ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
CHILD = """
import sys, time
from xrl.launch.signals import stop_with_parent

def first():
    print("first", flush=True)
    {action}

stop_with_parent(first)
print("ready", flush=True)
time.sleep(600)
"""
# Starts the child, says its id, and waits.
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("action", ["pass", "time.sleep(600)", "raise RuntimeError", "sys.exit()"])
def test_whatever_is_to_be_done_first_a_process_ends_with_its_parent(action: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD.format(action=action)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert parent.stdout.readline() == "ready\n"
        os.kill(parent.pid, signal.SIGKILL)
        assert parent.stdout.readline() == "first\n"
        deadline = time.monotonic() + 60
        while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline
            time.sleep(0.05)
