"""What is started is in proportion to the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.small_runs import Refusal, check
from xrl.preflight import processes


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "num_cores", lambda: 2)
    monkeypatch.setattr(processes, "num_cuda_devices", lambda: 0)


@pytest.mark.parametrize(
    ("flag", "most"), [("--rollout-num-workers", 16), ("--rollout-num-threads", 16), ("--judge-num-workers", 64)]
)
def test_more_processes_than_the_cores_could_run_are_refused(refusal: Refusal, flag: str, most: int) -> None:
    sentence = refusal(flag, str(most + 1))
    assert sentence.startswith(f"{flag} {most + 1} is more than the {most} that this machine with 2 cores")
    assert flag in refusal(flag, "2147483647")


def test_more_ranks_than_the_cores_could_run_are_refused(refusal: Refusal) -> None:
    sentence = refusal(world_size=99_999)
    assert sentence.startswith("--nproc-per-node 99,999 is more than the 16 that this machine with 2 cores")


def test_as_many_ranks_as_a_layout_needs_may_share_a_few_cores(model: Path, data: Path, tmp_path: Path) -> None:
    check(model, data, tmp_path, "--rollout-num-workers", "16", "--judge-num-workers", "64", world_size=16)


def test_large_machines_run_more(refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "num_cores", lambda: 64)
    assert "does not divide the 256 ranks" in refusal("--tensor-model-parallel-size", "3", world_size=256)
    assert "more than the 256 that this machine with 64 cores" in refusal(world_size=257)


def test_ranks_need_a_cuda_device_each_where_there_are_any(refusal: Refusal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "num_cuda_devices", lambda: 4)
    assert "--nproc-per-node 8 needs a CUDA device for each rank, and 4 are visible" in refusal(world_size=8)
    assert "does not divide the 4 ranks" in refusal("--tensor-model-parallel-size", "3", world_size=4)
