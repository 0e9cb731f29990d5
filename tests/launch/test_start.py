"""What every process does first."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
