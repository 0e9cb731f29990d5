"""The limit of open files: raised, and shared out."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from xrl.launch.descriptors import MOST, RESERVE, limit, spare_connections

PROGRAM = (
    "import resource, subprocess, sys; from xrl.launch.descriptors import *\n"
    "raise_limit(); print(limit(), spare_connections(), resource.getrlimit(resource.RLIMIT_NOFILE)[1], flush=True)\n"
    "subprocess.run([sys.executable, '-c', 'import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])'])"
)


def run(soft: int, hard: int) -> list[int]:
    """Limit, spare connections and hard limit of a process that starts with these limits; then a child's limit."""
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)),
    )
    return [int(word) for word in found.stdout.split()]


def test_soft_limit_is_raised_to_the_hard_one_for_children_too() -> None:
    raised, spare, hard, of_child = run(256, 1024)
    assert raised == hard == of_child == 1024
    assert 1024 // 2 < spare < 1024 - RESERVE


def test_hard_limit_leaves_something_for_all_else() -> None:
    raised, spare, _, _ = run(256, 256)
    assert raised == 256
    assert 100 < spare <= 256 - RESERVE


def test_at_least_one_connection_is_possible() -> None:
    assert run(64, 64)[1] == 1


def test_limit_without_end_is_not_taken_at_its_word() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard <= MOST:
        pytest.skip(f"the hard limit here is {hard}")
    assert run(256, hard)[0] == MOST


def test_a_higher_soft_limit_stays() -> None:
    assert spare_connections() < limit() <= MOST
