"""Export and plan against real megatron-core models on real ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.distributed.launch import run_ranks
from tests.tiny_models import FAMILIES, make_checkpoint
from xrl.kernels.native import native_module
from xrl.parallel.layout import Layout
from xrl.weights import shared_export
from xrl.weights.convert import open_source, to_megatron
from xrl.weights.plan import plan

WORKER = Path(__file__).with_name("export_worker.py")


@pytest.mark.distributed
@pytest.mark.slow
def test_every_family_leaves_its_ranks_as_it_came(tmp_path: Path) -> None:
    """TP2 x PP2, five layers on two stages, and a vocabulary that two ranks do not divide; every second one is tied."""
    folders = [
        make_checkpoint(
            tmp_path / family,
            family=family,
            tied=number % 2 == 0,
            vocab_size=99,
            num_hidden_layers=5,
            with_tokenizer=False,
        )
        for number, family in enumerate(FAMILIES)
    ]
    converted = tmp_path / "converted"
    source = open_source(folders[0])
    to_megatron(source, converted, plan(source.shape, Layout(tensor_size=2, pipeline_size=2)), lambda _: None)
    run_ranks(WORKER, 4, "--tp=2", "--pp=2", f"--converted={converted}", "--models", *folders)


@pytest.mark.distributed
@pytest.mark.slow
def test_experts_come_from_all_their_ranks(tmp_path: Path) -> None:
    """TP2 x EP2: half of the experts lie on data-parallel ranks that hold copies of everything else."""
    folders = [
        make_checkpoint(tmp_path / family, family=family, tied=False, with_tokenizer=False)
        for family in ("qwen3_moe", "deepseek_v3")
    ]
    run_ranks(WORKER, 4, "--tp=2", "--ep=2", "--models", *folders)


def test_a_rank_that_has_ended_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_export.dist, "barrier", lambda group: None)
    monkeypatch.setattr(shared_export, "ALIVE_INTERVAL_S", 0.05)
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    counters = torch.zeros(3, shared_export.CACHE_LINE, dtype=torch.int32)
    steps = shared_export._Steps(counters, SimpleNamespace(rank=0, control=None), 0.3)
    steps.free_segment()
    steps.finish()
    counters[1, 1] = child.pid
    steps.wait_for_ranks([0])
    with pytest.raises(RuntimeError, match=f"rank 1 has ended .process {child.pid}."):
        steps.wait_for_ranks([0, 1])
    counters[1, 0] = 1  # it had written its share before
    steps.wait_for_ranks([0, 1])
    counters[1, 0], counters[1, 1] = 0, os.getpid()  # alive, and does not come
    with pytest.raises(RuntimeError, match="rank 1 .process .* did not come within 0.3 s"):
        steps.wait_for_ranks([0, 1])


def test_a_process_whose_status_nobody_has_asked_for_has_ended() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
    assert not shared_export._is_alive(child.pid)
    child.wait()
    assert not shared_export._is_alive(child.pid)
    assert shared_export._is_alive(os.getpid())


def test_steps_wake_those_who_wait() -> None:
    native = native_module()
    assert native is not None
    counter = torch.zeros(1, dtype=torch.int32)
    assert not native.wait_for_step(counter.data_ptr(), 1, 0.01)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(native.wait_for_step, counter.data_ptr(), 2, 30.0)
        native.set_step(counter.data_ptr(), 1)
        native.set_step(counter.data_ptr(), 2)
        assert waiting.result(timeout=10)
