"""The demo beside busy loops: `python benchmarks/busy_machine.py`.

Whole runs of `examples/demo.py`, idle and beside 2, 4 and 8 processes that never stop, by turns. On c cores a run of t
threads beside n loops gets t / (t + n) of them, so its fair time is 1 + n / t times the idle one where t >= c. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

REPOSITORY = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """`count` processes that compute without end."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
        for loop in loops:
            loop.wait()


def run_demo(num_loops: int, flags: list[str]) -> float:
    """Seconds of one run of the demo beside `num_loops` loops.

    Raises:
        SystemExit: it failed; its last lines are shown.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryDirectory() as work_dir, busy_loops(num_loops):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, REPOSITORY / "examples" / "demo.py", "--work-dir", work_dir, "--", *flags],
            env=environment,
            capture_output=True,
            text=True,
        )
        seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"the demo failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return seconds


def main() -> None:
    """Run by turns and print the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2, help="runs of each kind")
    parser.add_argument("--loops", type=int, nargs="+", default=[2, 4, 8], help="numbers of busy loops")
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="further flags of xrl train")
    options = parser.parse_args()
    seconds: dict[int, list[float]] = {count: [] for count in (0, *options.loops)}
    for repeat in range(1, options.repeats + 1):
        for count, seen in seconds.items():
            seen.append(run_demo(count, options.flags))
            print(f"run {repeat} of {options.repeats} beside {count} loops: {seen[-1]:.1f} s", flush=True)
    idle = median(seconds[0])
    ratios = {count: median(seen) / idle for count, seen in seconds.items() if count}
    for count, ratio in ratios.items():
        print(f"beside {count} loops: {ratio:.2f} times the idle {idle:.1f} s")
    print(json.dumps({"seconds": seconds, "ratios": ratios}))


if __name__ == "__main__":
    main()
