"""Whole runs on hosts whose name nobody knows, or that have little shared memory: namespaces of this one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small_runs import run_flags, write_rows
from tests.tiny_models import make_checkpoint

ROOT = Path(__file__).resolve().parents[2]
# Set where namespaces can be made: then a test that cannot make one fails.
NEED_NAMESPACES = "XRL_TESTS_NEED_NAMESPACES"
TWO_RANKS = ("--nproc-per-node", "2", "--tensor-model-parallel-size", "2")
# A label of 64 letters is one more than a name server's protocol can say.
NAMES = ["nowhere.invalid", "a" * 64]
SHARED_MEMORY = {
    "small": "mount -t tmpfs -o size=64k none /dev/shm",
    "read-only": "mount -t tmpfs -o ro none /dev/shm",
}

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.cluster]


def train_where(folder: Path, kind: str, preparation: str, *flags: str) -> None:
    """A small run in a namespace of this kind (an option of `unshare`), after a shell command there."""
    if subprocess.run(["unshare", kind, "true"], capture_output=True).returncode and NEED_NAMESPACES not in os.environ:
        pytest.skip(f"this user cannot make namespaces: unshare {kind}")
    model = make_checkpoint(folder / "model")
    data = write_rows(folder / "train.jsonl", [{"prompt": f"{n}+1=?", "ground_truth": str(n + 1)} for n in range(8)])
    judge = f"{Path(__file__).with_name('digits_judge.py')}:reward"
    train = [sys.executable, "-m", "xrl.cli", "train", *flags, *run_flags(model, data, folder), "--judge", judge]
    found = subprocess.run(
        ["unshare", kind, "sh", "-c", f'{preparation} && exec "$@"', "sh", *train, "--num-rollouts", "1"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        # torch tries for five minutes to reach a host that it does not know.
        timeout=250,
    )
    assert found.returncode == 0, found.stderr[-4000:]
    assert list((folder / "work").glob("*/hf-final/config.json"))


@pytest.mark.parametrize("name", NAMES, ids=len)
@pytest.mark.parametrize("transport", ["auto", "broadcast"])
def test_name_of_the_host_may_be_known_to_nobody(tmp_path: Path, name: str, transport: str) -> None:
    program = f"{sys.executable} -c 'import socket; socket.sethostname(\"{name}\")'"
    train_where(tmp_path, "--uts", program, *TWO_RANKS, "--weight-transport", transport)


@pytest.mark.parametrize("shared_memory", SHARED_MEMORY)
def test_shared_memory_folder_is_not_needed(tmp_path: Path, shared_memory: str) -> None:
    assert shutil.which("mount")
    train_where(tmp_path, "--mount", SHARED_MEMORY[shared_memory], *TWO_RANKS)
