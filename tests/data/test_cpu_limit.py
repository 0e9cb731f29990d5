"""Code of others computes for so long, and no longer."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from xrl.data.cpu_limit import CpuLimit


def compute(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_what_computes_too_long_is_interrupted() -> None:
    with pytest.raises(TimeoutError), CpuLimit(0.02):
        compute(60.0)


def test_waiting_is_not_computing() -> None:
    with CpuLimit(0.02):
        time.sleep(0.1)


def test_nothing_is_left_of_it() -> None:
    before = signal.getsignal(signal.SIGVTALRM)
    with CpuLimit(0.02):
        pass
    compute(0.05)
    assert signal.getsignal(signal.SIGVTALRM) == before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_other_threads_are_left_alone() -> None:
    done = []

    def work() -> None:
        with CpuLimit(0.001):
            compute(0.02)
        done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(60.0)
    assert done
