"""Groups that share an event loop: they work, and there is one loop."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import contextlib
import os
import pathlib
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from xrl.parallel.gloo import one_event_loop

original = distributed_c10d.ProcessGroupGloo
with one_event_loop():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore(), timeout=timedelta(seconds=7))
    groups = [dist.new_group(backend="gloo", timeout=timedelta(seconds=9)) for _ in range(3)]
assert distributed_c10d.ProcessGroupGloo is original
for group in groups:
    x = torch.arange(3.0)
    dist.all_reduce(x, group=group)
    assert x.tolist() == [0, 1, 2]
    assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=9)


def names_of_threads():
    names = []
    for path in pathlib.Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # a thread may end meanwhile
            names.append(path.read_text().strip())
    return names


# A thread takes its name once it runs, until then it has that of its maker.
end = time.monotonic() + 60
while "gloo_tcp_loop" not in names_of_threads() and time.monotonic() < end:
    time.sleep(0.01)
time.sleep(0.5)  # others, if there are any, take theirs
print(names_of_threads().count("gloo_tcp_loop"), flush=True)
dist.destroy_process_group()
os._exit(0)  # torch's threads may abort the end of the interpreter, whatever their groups share
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
@pytest.mark.parametrize("interface", [None, "lo"])
def test_groups_share_one_event_loop(interface: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if interface is None:
        monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    else:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1"]
