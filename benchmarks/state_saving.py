"""Saving the state of an actor while it trains: `python benchmarks/state_saving.py`.

A Qwen2.5-0.5B of random weights (494M parameters, tied), updates on a few short answers, fp32, one rank on the CPU.
Three ways, each in a process of its own, by turns: nothing is saved; the state is saved as a run saves it, behind one
update and while the next ones are made; the same tensors go to `torch.save`, which the run waits for. Steps are timed
with whatever saving holds them up. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from random_samples import random_samples
from rich.console import Console
from rich.table import Table
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

from xrl.actor.actor import Actor
from xrl.actor.state import ActorState
from xrl.algorithms.grpo import GRPO
from xrl.checkpoint.manifest import Manifest
from xrl.checkpoint.writer import LeadPart, Saved, StateWriter
from xrl.config import AlgorithmConfig, ModelConfig, OptimizerConfig, PackingConfig, ParallelConfig
from xrl.files.whole import flush_to_disk
from xrl.parallel.control import Control
from xrl.parallel.megatron import initialize, shutdown
from xrl.types import Sample

WAYS = ("nothing", "state", "torch.save")
VOCAB_SIZE = 151_936
NUM_GROUPS, NUM_SAMPLES, PROMPT_TOKENS, RESPONSE_TOKENS = 2, 4, 32, 64
SAVES_BEHIND = 3  # updates: the first warms up


def write_model(folder: Path, num_layers: int) -> None:
    torch.manual_seed(0)
    disable_progress_bar()
    config = Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=num_layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)


def make_samples() -> list[Sample]:
    return random_samples(
        vocab_size=VOCAB_SIZE,
        num_groups=NUM_GROUPS,
        num_samples=NUM_SAMPLES,
        prompt_tokens=PROMPT_TOKENS,
        response_tokens=RESPONSE_TOKENS,
    )


def lead_part(state: ActorState) -> LeadPart:
    manifest = Manifest(
        step=SAVES_BEHIND,
        num_updates=state.num_updates,
        cut=state.cut,
        files={},
        identity={},
        circumstances={},
        settings={},
        schedule=state.schedule(),
        parts={},
    )
    return LeadPart(manifest=manifest, arrays={})


def train(options: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: updates, one save, and what they took."""
    torch.set_num_threads(options.num_threads)
    parallel = ParallelConfig()
    groups = initialize(parallel, seed=1)
    actor = Actor(
        model=ModelConfig(model=options.model, bf16=False, fused_linear_logprob=True),
        parallel=parallel,
        optimizer=OptimizerConfig(lr=1e-5),
        packing=PackingConfig(max_tokens_per_microbatch=1024),
        groups=groups,
        num_updates=options.updates,
    )
    algorithm, samples, state = GRPO(AlgorithmConfig(old_logprobs="rollout")), make_samples(), ActorState(actor)
    writer = StateWriter(options.folder, Control.of(groups), file_name=state.file_name, keep=1)
    found: dict[str, Any] = {}
    seconds = []
    for number in range(1, options.updates + 1):
        start = time.perf_counter()
        actor.learn(samples, algorithm)
        if options.way == "state":
            if writer.is_writing and isinstance(saved := writer.settle(wait=number == options.updates), Saved):
                found |= {"seconds": saved.seconds, "held_up": saved.seconds_held_up, "mb": saved.num_bytes / 1e6}
            if number == SAVES_BEHIND:
                assert writer.begin(number, state.pieces(), lead_part(state)) is None
        elif options.way == "torch.save" and number == SAVES_BEHIND:
            begun = time.perf_counter()
            file = options.folder / "state.pt"
            torch.save(state.pieces(), file)
            flush_to_disk(file)
            found |= {"seconds": time.perf_counter() - begun, "held_up": time.perf_counter() - begun}
            found["mb"] = file.stat().st_size / 1e6
        seconds.append(time.perf_counter() - start)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    state_mb = sum(tensor.nbytes for tensor in state.pieces().values()) / 1e6
    shutdown()
    return {**found, "peak_mb": peak / 1e6, "state_mb": state_mb, "steps": seconds}


def run_process(model: Path, way: str, options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=options.disk) as folder:
        command = [sys.executable, __file__, "--model", str(model), "--way", way, "--folder", folder]
        command += ["--updates", str(options.updates), "--num-threads", str(options.num_threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.num_threads)}
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{finished.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return found


def summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Medians; of steps: those without a save, the one that begins it, and the one beside whose work it is written."""
    plain = [
        s for run in runs for n, s in enumerate(run["steps"], 1) if n > 1 and n not in (SAVES_BEHIND, SAVES_BEHIND + 1)
    ]
    return {
        "step_seconds": median(plain),
        "saving_step_seconds": median(run["steps"][SAVES_BEHIND - 1] for run in runs),
        "next_step_seconds": median(run["steps"][SAVES_BEHIND] for run in runs),
        **{
            key: median(run.get(key, 0.0) for run in runs)
            for key in ("seconds", "held_up", "mb", "peak_mb", "state_mb")
        },
    }


def main() -> None:
    """All ways by turns, and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--updates", type=int, default=7)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--num-threads", type=int, default=2)
    parser.add_argument("--disk", type=Path, help="where to save; default: where temporary files go")
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.model:
        print(json.dumps(train(options)))
        return
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), options.layers)
        for repeat in range(options.repeats):
            for way, seen in runs.items():
                print(f"run {repeat + 1} of {options.repeats}: {way} ...", flush=True)
                seen.append(run_process(Path(folder), way, options))
    found = {way: summary(seen) for way, seen in runs.items()}
    table = Table(title="an actor of 0.5B parameters, medians")
    for column in ("", *WAYS):
        table.add_column(column, justify="left" if not column else "right")
    for words, key, form in (
        ("a step, s", "step_seconds", ".2f"),
        ("the step that saves, s", "saving_step_seconds", ".2f"),
        ("the one behind it, s", "next_step_seconds", ".2f"),
        ("to the end of the save, s", "seconds", ".2f"),
        ("of which the run waits, s", "held_up", ".2f"),
        ("saved, MB", "mb", ",.0f"),
        ("peak memory, MB", "peak_mb", ",.0f"),
    ):
        table.add_row(words, *(format(found[way][key], form) for way in WAYS))
    Console(width=100).print(table)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
