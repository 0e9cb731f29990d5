"""Start a script on several gloo ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path


def run_ranks(script: Path, num_ranks: int, *arguments: object, timeout_s: float = 300.0) -> None:
    """Run `script` on several ranks of the CPU; a failure shows what they printed."""
    command = [sys.executable]
    if num_ranks > 1:
        command += [str(Path(__file__).with_name("forked_ranks.py")), str(num_ranks)]
    root = str(Path(__file__).parents[2])
    environment = {
        **os.environ,
        "PYTHONPATH": root,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "CUDA_VISIBLE_DEVICES": "",
    }
    process = subprocess.Popen(
        [*command, str(script), *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)  # ranks that hang too
        output, errors = process.communicate()
        print(f"{output[-2000:]}\n{errors[-6000:]}")
        raise
    assert process.returncode == 0, f"{script.name} {arguments}:\n{output[-2000:]}\n{errors[-6000:]}"
