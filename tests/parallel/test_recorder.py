"""Collectives that have not ended: as the recorder gives them, and as torch records them."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from xrl.launch.hang import Pending
from xrl.parallel.recorder import BUFFER_SIZE, OLDER_VARIABLE, TORCH_GRACE_S, VARIABLE, overdue_s, pending_in, switch_on

ROOT = Path(__file__).resolve().parents[2]
NOW_S = 1_000_000.0
# Two ranks; rank 1 stays away from the second broadcast. Rank 0's word of it goes to stdout.
RANK = """
import json, os, sys, threading, time
from dataclasses import asdict
from xrl.launch.hang import Pending
from xrl.parallel.recorder import pending_collectives, switch_on
switch_on(os.environ)
import torch, torch.distributed as dist

rank, store = int(sys.argv[1]), dist.FileStore(sys.argv[2], 2)
dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
group = dist.new_group(backend="gloo", group_desc="control")
dist.broadcast(torch.zeros(4, 2), src=0, group=group)

def look():
    while [each.number for each in pending_collectives()] != [2]:
        time.sleep(0.01)
    print(json.dumps([asdict(each) for each in pending_collectives()]), flush=True)
    os._exit(0)

if rank == 1:
    threading.Thread(target=look).start()
    dist.broadcast(torch.zeros(3, dtype=torch.int64), src=0, group=group)
time.sleep(600)
"""


def entry(**changes: Any) -> dict[str, Any]:
    return {
        "process_group": ["12", "control"],
        "collective_seq_id": 56,
        "p2p_seq_id": 3,
        "is_p2p": False,
        "profiling_name": "gloo:broadcast",
        "input_sizes": [[4, 2]],
        "input_dtypes": ["Float"],
        "time_created_ns": int((NOW_S - 5.0) * 1e9),
        "timeout_ms": 600_000,
        "state": "scheduled",
        "retired": False,
        **changes,
    }


def pending(*entries: dict[str, Any]) -> list[Pending]:
    return pending_in({"entries": list(entries)}, {"12": "[0, 1]"}, now_s=NOW_S)


def test_what_has_ended_is_left_out_and_the_oldest_comes_first() -> None:
    newer = entry(collective_seq_id=57, time_created_ns=int(NOW_S * 1e9))
    found = pending(newer, entry(), entry(retired=True), entry(state="completed"))
    assert [each.number for each in found] == [56, 57]
    first = found[0]
    assert (first.group, first.ranks, first.shapes, first.dtypes) == ("12 (control)", "[0, 1]", ((4, 2),), ("Float",))
    assert (first.waited_s, first.timeout_s) == pytest.approx((5.0, 600.0))


def test_a_message_between_two_ranks_has_a_number_of_its_own() -> None:
    (found,) = pending(entry(is_p2p=True))
    assert found.is_message and found.number == 3


def test_a_group_without_a_purpose_is_named_alone() -> None:
    (found,) = pending(entry(process_group=["9", "undefined"]))
    assert (found.group, found.ranks) == ("9", "")


def test_nothing_recorded_is_nothing_pending() -> None:
    assert pending_in({"pg_config": {}}, {}, now_s=NOW_S) == []


@pytest.mark.parametrize("rounded_up_s", [0.0, 59.0])
def test_a_collective_is_overdue_before_torch_ends_it(rounded_up_s: float) -> None:
    timeout_s = 600.0 + TORCH_GRACE_S + rounded_up_s
    for waited_s, expected in ((599.0, 0.0), (601.0, 601.0)):
        assert overdue_s(waiting(waited_s, timeout_s), limit_s=600.0) == pytest.approx(expected)


@pytest.mark.parametrize("timeout_s", [120.0, 365 * 86400.0])
def test_a_group_with_a_time_out_of_another_kind_is_never_overdue(timeout_s: float) -> None:
    assert overdue_s(waiting(601.0, timeout_s), limit_s=600.0) == 0.0


def test_a_group_that_torch_does_not_know_is_never_overdue() -> None:
    found = dataclasses.replace(waiting(601.0, 600.0 + TORCH_GRACE_S), ranks="")
    assert overdue_s(found, limit_s=600.0) == 0.0


def waiting(waited_s: float, timeout_s: float) -> Pending:
    created = int((NOW_S - waited_s) * 1e9)
    (found,) = pending(entry(time_created_ns=created, timeout_ms=1e3 * timeout_s))
    return found


@pytest.mark.parametrize("name", [VARIABLE, OLDER_VARIABLE])
def test_whoever_has_set_the_recorder_is_left_alone(name: str) -> None:
    environment = {name: "7"}
    switch_on(environment)
    assert environment == {name: "7"}


def test_the_recorder_is_switched_on() -> None:
    environment: dict[str, str] = {}
    switch_on(environment)
    assert environment == {VARIABLE: str(BUFFER_SIZE)}


@pytest.mark.slow
@pytest.mark.distributed
def test_torch_records_the_collective_that_a_gloo_rank_waits_in(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], env=environment, stdout=subprocess.PIPE)
        for rank in (0, 1)
    ]
    try:
        said, _ = ranks[1].communicate(timeout=120)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait(10)
    (found,) = json.loads(said)
    assert (found["name"], found["number"], found["is_message"]) == ("gloo:broadcast", 2, False)
    assert found["group"].endswith("(control)") and found["ranks"].replace(" ", "") == "[0,1]"
    assert (found["shapes"], found["dtypes"]) == ([[3]], ["Long"])
