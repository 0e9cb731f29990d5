"""Large pages from the start of a process, or not at all."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from xrl.launch.memory import TUNABLES

PROGRAM = (
    "import os, sys; from xrl.launch.memory import restart_with_large_pages; print(os.getpid(), flush=True);"
    "restart_with_large_pages(); print(os.environ.get('GLIBC_TUNABLES'), sys.argv[1:])"
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc is Linux's")


def run(**variables: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name != TUNABLES}
    command = [sys.executable, "-X", "utf8", "-c", PROGRAM, "a b", "--flag"]
    result = subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


def test_the_command_is_started_again_once_as_it_was() -> None:
    first, second, last = run()
    assert first == second  # the same process
    assert last == "glibc.malloc.hugetlb=1 ['a b', '--flag']"


def test_somebody_elses_settings_stay() -> None:
    assert run(**{TUNABLES: "glibc.malloc.check=1"})[1:] == ["glibc.malloc.check=1 ['a b', '--flag']"]
