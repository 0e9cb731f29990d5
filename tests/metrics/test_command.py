"""The command as it was typed."""

from __future__ import annotations

import sys

import pytest

from xrl.metrics.command import readable_command, typed_command

TRAIN = ["train", "--lr", "1e-6", "--judge", "my judge.py:reward"]


@pytest.mark.parametrize(
    "start",
    [
        ["/env/bin/python", "/env/bin/xrl"],
        ["/env/bin/python3.11", "-P", "-X", "utf8", "-W", "error", "/env/bin/xrl"],
        ["python", "-m", "xrl.cli"],
        ["python", "-u", "-m", "xrl.cli"],
    ],
)
def test_command_is_xrl_however_python_was_started(start: list[str]) -> None:
    assert readable_command([*start, *TRAIN]) == ["xrl", *TRAIN]


def test_torchrun_stays_torchrun() -> None:
    ranks = ["--nproc-per-node", "2", "-m", "xrl.train", "--lr", "1"]
    assert readable_command(["/env/bin/python", "/env/bin/torchrun", *ranks]) == ["torchrun", *ranks]
    module = ["-m", "torch.distributed.run", *ranks]
    assert readable_command(["/env/bin/python", *module]) == ["python", *module]


def test_other_programs_keep_python_before_them() -> None:
    assert readable_command(["/env/bin/python", "own_loop.py", "--lr", "1"]) == ["python", "own_loop.py", "--lr", "1"]
    assert readable_command(["python", "-c", "print(1)", "-m"]) == ["python", "-c", "print(1)", "-m"]
    assert readable_command(["python"]) == ["python"]


def test_command_of_this_process_ends_as_it_was_typed() -> None:
    assert typed_command()[-1] == sys.orig_argv[-1]
