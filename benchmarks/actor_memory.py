"""Peak memory of an actor with and without whole logits: `python benchmarks/actor_memory.py`.

A Qwen3 of random weights with a vocabulary of 151,936 (hidden 256, 2 layers, tied), updates on 64 answers of 64 tokens
in micro-batches of 4,096 tokens, fp32, one rank on the CPU; each way in a process of its own. Losses of both are
printed beside each other. The last line is JSON.
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
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from xrl.actor.actor import Actor
from xrl.algorithms.grpo import GRPO
from xrl.config import (
    AlgorithmConfig,
    ModelConfig,
    OptimizerConfig,
    PackingConfig,
    ParallelConfig,
)
from xrl.parallel.megatron import initialize, shutdown
from xrl.types import Sample

VOCAB_SIZE = 151_936
NUM_GROUPS, NUM_SAMPLES, PROMPT_TOKENS, RESPONSE_TOKENS = 8, 8, 16, 64


def write_model(folder: Path) -> None:
    torch.manual_seed(0)
    disable_progress_bar()
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


def make_samples() -> list[Sample]:
    return random_samples(
        vocab_size=VOCAB_SIZE,
        num_groups=NUM_GROUPS,
        num_samples=NUM_SAMPLES,
        prompt_tokens=PROMPT_TOKENS,
        response_tokens=RESPONSE_TOKENS,
    )


def update(options: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own: some updates, and what they took."""
    torch.set_num_threads(options.num_threads)
    parallel = ParallelConfig()
    groups = initialize(parallel, seed=1)
    actor = Actor(
        model=ModelConfig(model=options.model, bf16=False, fused_linear_logprob=options.fused_linear_logprob),
        parallel=parallel,
        optimizer=OptimizerConfig(lr=1e-4),
        packing=PackingConfig(max_tokens_per_microbatch=options.microbatch),
        groups=groups,
        num_updates=options.updates,
    )
    algorithm, samples = GRPO(AlgorithmConfig(old_logprobs="rollout")), make_samples()
    seconds, losses = [], []
    for _ in range(options.updates):
        start = time.perf_counter()
        (report,) = actor.learn(samples, algorithm)
        seconds.append(time.perf_counter() - start)
        losses.append(report.metrics["loss"].value)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    shutdown()
    return {"peak_mb": peak / 1e6, "update_seconds": median(seconds[1:] or seconds), "losses": losses}


def run_process(model: Path, options: argparse.Namespace, *, linear: bool) -> dict[str, Any]:
    command = [sys.executable, __file__, "--model", str(model), "--updates", str(options.updates)]
    command += ["--num-threads", str(options.num_threads), "--microbatch", str(options.microbatch)]
    command += ["--fused-linear-logprob"] if linear else []
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.num_threads)}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{finished.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Both ways, and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--num-threads", type=int, default=2)
    parser.add_argument("--microbatch", type=int, default=4096, help="tokens")
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--fused-linear-logprob", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.model:
        print(json.dumps(update(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        logits, linear = (run_process(Path(folder), options, linear=linear) for linear in (False, True))
    table = Table(title=f"an actor at a vocabulary of {VOCAB_SIZE:,}")
    for column in ("", "whole logits", "--fused-linear-logprob"):
        table.add_column(column, justify="left" if not column else "right")
    for words, key, form in (("peak memory, MB", "peak_mb", ",.0f"), ("an update, s", "update_seconds", ".2f")):
        table.add_row(words, *(format(found[key], form) for found in (logits, linear)))
    for number, losses in enumerate(zip(logits["losses"], linear["losses"], strict=True), start=1):
        table.add_row(f"loss of update {number}", *(f"{loss:.7f}" for loss in losses))
    Console(width=100).print(table)
    print(json.dumps({"peak_ratio": linear["peak_mb"] / logits["peak_mb"], "logits": logits, "linear": linear}))


if __name__ == "__main__":
    main()
