"""Teach a tiny student arithmetic with GRPO, in minutes on a laptop: `python examples/demo.py`.

    python examples/demo.py --layout tp2pp2      the same in 3D: 4 ranks, tensor x pipeline parallel
    python examples/demo.py --layout tp2pp2dp2   8 ranks, and data parallel

Trains `examples/student` with `configs/demo_<layout>.yaml`, and ends with its pass rates on held-out problems before
and after, the reward curve, and where everything was written. The last line is JSON. Flags of `xrl train` may follow
`--`: `python examples/demo.py -- --num-rollouts 20`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from xrl.files.disk import NotWritten
from xrl.metrics.curve import save_curve, terminal_curve
from xrl.metrics.run_folder import RunFolder
from xrl.metrics.sinks import read_rows

REPOSITORY = Path(__file__).resolve().parent.parent
NUM_RANKS = {"single": 1, "tp2pp2": 4, "tp2pp2dp2": 8}
SCORES = {
    "eval/pass@1": "sampled at temperature 1",
    "eval/pass@4": "one right among 4 samples",
    "eval/greedy": "greedy",
}

INTRODUCTION = """\
A Qwen3 of 0.85M parameters gets about half of its two-step word problems right. GRPO now lets it practise: each
rollout draws 8 answers to each of 32 problems, a rule judges them, and two updates make the better ones likelier."""


def parse_options() -> argparse.Namespace:
    """The demo's own flags, and what goes to `xrl train` as it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", default="single", choices=tuple(NUM_RANKS), help="how the model is spread")
    parser.add_argument("--seed", type=int, default=0, help="seed of data order and sampling")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dir/demo"), help="where the run's folder goes")
    parser.add_argument("flags", nargs="*", metavar="-- FLAGS", help="further flags of xrl train")
    return parser.parse_args()


def train(options: argparse.Namespace) -> Path:
    """Run `xrl train` and return the folder it wrote.

    Raises:
        SystemExit: training failed, and said why.
    """
    work_dir: Path = options.work_dir.resolve()
    folders_before = set(work_dir.glob("*/"))
    flags = ["--config", f"configs/demo_{options.layout}.yaml", "--work-dir", str(work_dir)]
    flags += ["--seed", str(options.seed), *options.flags]
    if (num_ranks := NUM_RANKS[options.layout]) > 1:
        flags = ["--nproc-per-node", str(num_ranks), *flags]
    print(f"\n$ xrl train {shlex.join(flags)}\n", flush=True)
    # Ranks and rollout workers share few cores here: those that wait must not spin.
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
    done = subprocess.run([sys.executable, "-m", "xrl.cli", "train", *flags], cwd=REPOSITORY, env=environment)
    if done.returncode:
        sys.exit(done.returncode)
    (folder,) = set(work_dir.glob("*/")) - folders_before
    return folder


def show(folder: RunFolder, train_seconds: float) -> dict[str, Any]:
    """Print the curve, the pass rates in words and the paths; return the figures of the last line."""
    rows = read_rows(folder.metrics)
    scores = [
        {words: row[name] for name, words in SCORES.items() if name in row} for row in rows if "eval/pass@1" in row
    ]
    try:
        save_curve(rows, folder.reward_curve, eval_key="eval/pass@1", title=f"demo, {folder.path.name}")
    except NotWritten as error:  # the run's own curve is there
        print(f"demo: {error}", file=sys.stderr)
    print(f"\n{terminal_curve(rows)}\n")
    # The run itself has ended with a table: here is what its names mean.
    rates = [f"{words} {score:.3f} -> {scores[-1][words]:.3f}" for words, score in scores[0].items()]
    print(f"Pass rates on held-out problems after {train_seconds:.0f} s of training: {', '.join(rates)}. Written:")
    for what, path in (
        ("trained model", folder.final_checkpoint),
        ("reward curve", folder.reward_curve),
        ("metrics", folder.metrics),
        ("every answer", folder.path / "rollout_idx_*_trajectory.jsonl"),
    ):
        print(f"  {what + ':':14} {path}")
    return {
        "pass_rate_before": scores[0]["sampled at temperature 1"],
        "pass_rate_after": scores[-1]["sampled at temperature 1"],
        "train_seconds": round(train_seconds, 1),
        "hf_final": str(folder.final_checkpoint),
    }


def main() -> None:
    """Train, then show what came of it."""
    options = parse_options()
    # Told to end, end the training too: `subprocess.run` kills what it has started when an exception leaves it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    print(INTRODUCTION)
    start = time.perf_counter()
    folder = RunFolder(train(options))
    print(json.dumps(show(folder, time.perf_counter() - start)))


if __name__ == "__main__":
    main()
