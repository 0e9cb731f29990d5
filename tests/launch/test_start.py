"""What every process does first."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys

import pytest

from xrl.launch.start import without_collections

PROGRAM = (
    "import warnings; from xrl.launch.start import prepare_process; prepare_process()\n"
    "warnings.warn_explicit('careful', UserWarning, 'file.py', 1, module='{module}'); print('alive')"
)


@pytest.mark.parametrize("module", ["megatron.core", "xrlike"])
def test_warnings_of_others_end_nothing(module: str) -> None:
    command = [sys.executable, "-W", "error", "-c", PROGRAM.format(module=module)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.stdout == "alive\n" and "careful" in found.stderr


@pytest.mark.parametrize("module", ["xrl", "xrl.trainer"])
def test_warnings_about_our_own_code_are_errors_where_they_shall_be(module: str) -> None:
    command = [sys.executable, "-W", "error", "-c", PROGRAM.format(module=module)]
    assert subprocess.run(command, capture_output=True, text=True).stdout == ""


def test_interrupt_stops_a_command_that_a_shell_started_in_the_background() -> None:
    program = (
        "import os, signal; from xrl.launch.start import prepare_process; prepare_process()\n"
        "os.kill(os.getpid(), signal.SIGINT); print('alive')"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert "KeyboardInterrupt" in found.stderr and found.stdout == ""


def test_collections_pause_and_come_back_whatever_happens() -> None:
    assert gc.isenabled()
    with pytest.raises(ImportError), without_collections():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    try:
        with without_collections():
            pass
        assert not gc.isenabled(), "somebody else's choice"
    finally:
        gc.enable()
