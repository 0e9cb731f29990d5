"""Kill a run again and again, with all its processes, and let it go on: `python tests/faults/kill_anywhere.py`.

At random moments, and on purpose inside a save and inside a resume. In the end its model, its metrics (but for times
and memory) and its last state must be those of a run that nobody killed, and nothing of the killed ones may be left: no
process, no segment of shared memory, no lock, no half-written folder. The last line is JSON; exit code 0 where all of
that holds.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from xrl.metrics.sinks import read_rows  # noqa: E402

NUM_ROLLOUTS = 6
MEASURED = ("seconds", "tokens_per_s", "memory")
# What an attempt may take to its end, on a machine that does other things too.
LIMIT_S = 300.0
# Until what was killed is gone: workers look for their parent once a second.
GONE_S = 15.0


@dataclass(kw_only=True)
class Tally:
    """What became of it."""

    kills: int = 0
    in_a_save: int = 0
    in_a_resume: int = 0
    faults: list[str] = field(default_factory=list)


def command(run_dir: Path, flags: Sequence[str]) -> list[str]:
    """The run, which fits into half a minute."""
    return [
        *(sys.executable, "-m", "xrl.cli", "train", "--run-dir", str(run_dir)),
        *("--model", str(ROOT / "examples" / "student"), "--data", str(ROOT / "examples" / "data" / "train.jsonl")),
        *("--rollout-batch-size", "8", "--samples-per-prompt", "4", "--max-response-length", "32"),
        *("--max-prompt-length", "64", "--max-tokens-per-microbatch", "2048", "--num-rollouts", str(NUM_ROLLOUTS)),
        *("--lr", "1e-4", "--state-interval", "1", "--save-interval", "2", "--rollout-num-workers", "1"),
        *("--rollout-num-threads", "1", "--judge-num-workers", "1", "--on-nothing-learned", "warn"),
        *flags,
    ]


def start(run_dir: Path, flags: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("ab") as output:
        return subprocess.Popen(
            command(run_dir, flags),
            stdout=output,
            stderr=output,
            env=environment,
            cwd=ROOT,
            start_new_session=True,
        )


def processes_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        return [root, *root.children(recursive=True)]
    return []


def kill_all(process: subprocess.Popen[bytes], tally: Tally) -> None:
    """SIGKILL to every process of the run, in any order; what they had started ends by itself."""
    everything = processes_of(process)
    for one in everything:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.send_signal(signal.SIGKILL)
    process.wait()
    _, left = psutil.wait_procs(everything, timeout=GONE_S)
    if left:
        tally.faults.append(f"processes are left: {left}")


def shared_segments() -> set[str]:
    folder = Path("/dev/shm")
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def is_saving(run_dir: Path) -> bool:
    return any((run_dir / "state").glob(".step-*.partial"))


def saved(run_dir: Path) -> set[str]:
    return {path.name for path in (run_dir / "state").glob("step-*")}


def wait_for_moment(
    kind: str, rng: random.Random, process: subprocess.Popen[bytes], run_dir: Path, log: Path, *, longest_s: float
) -> bool:
    """Wait until it is time to kill; False where the run ended before.

    Args:
        longest_s: what a whole run takes.
    """
    deadline = time.monotonic() + LIMIT_S
    if kind == "any":
        end = time.monotonic() + rng.uniform(0.0, longest_s)
        while time.monotonic() < end and process.poll() is None:
            time.sleep(0.01)
        return process.poll() is None
    begun, seen = log.stat().st_size, len(saved(run_dir))
    has_saved = rng.randrange(2)  # this save, or the next one
    while process.poll() is None and time.monotonic() < deadline:
        if kind == "save" and is_saving(run_dir) and len(saved(run_dir)) >= min(seen + has_saved, 2):
            time.sleep(rng.uniform(0.0, 0.02))
            return True
        if kind == "resume" and b"run folder: " in log.read_bytes()[begun:]:
            time.sleep(rng.uniform(0.0, 1.0))
            return True
        time.sleep(0.0005 if kind == "save" else 0.02)
    return False


def repeatable(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics, but for what is measured."""
    return [
        {name: value for name, value in row.items() if not any(word in name for word in MEASURED)}
        for row in read_rows(run_dir / "metrics.jsonl")
    ]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def compare(straight: Path, broken: Path, tally: Tally) -> None:
    files = ["hf-final/model.safetensors"]
    files += [str(path.relative_to(straight)) for path in straight.glob(f"state/step-{NUM_ROLLOUTS}/*.safetensors")]
    files += [f"hf-{step}/model.safetensors" for step in range(2, NUM_ROLLOUTS, 2)]
    for name in files:
        if digest(straight / name) != digest(broken / name):
            tally.faults.append(f"{name} differs from that of the run that nobody killed")
    if repeatable(straight) != repeatable(broken):
        tally.faults.append("metrics.jsonl differs")
    left = [path.name for path in (*broken.glob(".*partial"), *broken.glob("state/.*"), *broken.glob("state/*.*"))]
    if left:
        tally.faults.append(f"left in the run's folder: {left}")


def kinds_of(num_kills: int, rng: random.Random) -> list[str]:
    """At least a quarter of the kills inside a save, and three in twenty inside a resume."""
    kinds = ["save"] * -(-num_kills // 4) + ["resume"] * -(-3 * num_kills // 20)
    kinds += ["any"] * (num_kills - len(kinds))
    rng.shuffle(kinds)
    return kinds[:num_kills]


def run(seed: int, num_kills: int, flags: Sequence[str], folder: Path) -> Tally:
    """Kill so many times, in as many runs as that takes, and compare each with the one that nobody killed."""
    rng, tally = random.Random(seed), Tally()
    straight, log = folder / "straight", folder / "log"
    segments, begun = shared_segments(), time.monotonic()
    if start(straight, flags, log).wait(LIMIT_S):
        sys.exit(f"the run that nobody kills failed:\n{log.read_text()[-4000:]}")
    longest_s = time.monotonic() - begun
    kinds, number = kinds_of(num_kills, rng), 0
    while tally.kills < num_kills and not tally.faults:
        broken, number = folder / f"broken-{number}", number + 1
        while tally.kills < num_kills and not is_nearly_done(broken):
            kind = next_kind(kinds, tally.kills, can_resume=bool(saved(broken)))
            process = start(broken, flags, log)
            if not wait_for_moment(kind, rng, process, broken, log, longest_s=longest_s):
                break  # it has come to its end, or failed: which of the two is seen below
            tally.in_a_save += is_saving(broken)
            tally.in_a_resume += kind == "resume"
            tally.kills += 1
            kill_all(process, tally)
            print(f"kill {tally.kills} of {num_kills}, {kind}; states: {sorted(saved(broken))}", flush=True)
        finish(broken, straight, flags, log, tally)
    for name in sorted(shared_segments() - segments):
        tally.faults.append(f"/dev/shm/{name} is left")
    return tally


def next_kind(kinds: list[str], number: int, *, can_resume: bool) -> str:
    """The kind of the next kill; one inside a resume waits until there is something to resume."""
    if kinds[number] == "resume" and not can_resume:
        later = next((index for index in range(number, len(kinds)) if kinds[index] != "resume"), number)
        kinds[number], kinds[later] = kinds[later], kinds[number]
    return kinds[number] if can_resume or kinds[number] != "resume" else "save"


def is_nearly_done(run_dir: Path) -> bool:
    """Whether the next attempt has little left to do: it is to come to its end, and the next kill takes another run."""
    return max((int(name.removeprefix("step-")) for name in saved(run_dir)), default=0) >= NUM_ROLLOUTS - 1


def finish(broken: Path, straight: Path, flags: Sequence[str], log: Path, tally: Tally) -> None:
    """Let a run come to its end, and compare it."""
    if start(broken, flags, log).wait(LIMIT_S):
        tally.faults.append(f"an attempt failed:\n{log.read_text()[-3000:]}")
    else:
        compare(straight, broken, tally)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="further flags of xrl train")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tally = run(options.seed, options.kills, options.flags, Path(folder))
    for fault in tally.faults:
        print(f"WRONG: {fault}")
    print(json.dumps({"seed": options.seed, **tally.__dict__}))
    sys.exit(1 if tally.faults else 0)


if __name__ == "__main__":
    main()
