"""One GRPO step, phases timed, ours and TRL's on the same model and prompts: `python benchmarks/grpo_step.py`.

Qwen3 with 6.4M random parameters, 32 prompts x 8 samples x exactly 128 new tokens, fp32 on CPU, 2 threads. Each library
runs in processes of its own, by turns; the first step of each run warms up and does not count. Memory is the highest
sum, over all processes of a library, of proportional set size (a page shared by n processes counts 1/n in each),
from start to end of a last run that is not timed: adding up the pages four times a second takes time from the cores.
TRL's settings are explained in `trl_step.py`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from transformers.utils.logging import disable_progress_bar

from xrl.metrics.memory import PeakMemory
from xrl.metrics.sinks import read_rows

REPOSITORY = Path(__file__).resolve().parent.parent
BENCHMARKS = REPOSITORY / "benchmarks"
STUDENT = REPOSITORY / "examples" / "student"  # for its tokenizer
PROMPTS = REPOSITORY / "examples" / "data" / "train.jsonl"

NUM_PROMPTS, NUM_SAMPLES = 32, 8


@dataclass(kw_only=True)
class Measurements:
    """What was seen of one library, all timed runs together, and its peak memory."""

    step_seconds: list[float] = field(default_factory=list)
    step_tokens: list[int] = field(default_factory=list)  # sampled in that step
    phase_seconds: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: int = 0

    def add_phases(self, **seconds: float) -> None:
        for phase, value in seconds.items():
            self.phase_seconds.setdefault(phase, []).append(value)

    def summary(self) -> dict[str, Any]:
        """Medians: tokens per second, seconds, bytes."""
        generation = self.phase_seconds["generation"]
        return {
            "tokens_per_s": median(n / s for n, s in zip(self.step_tokens, self.step_seconds, strict=True)),
            "generation_tokens_per_s": median(n / s for n, s in zip(self.step_tokens, generation, strict=True)),
            "step_seconds": median(self.step_seconds),
            "phase_seconds": {phase: median(values) for phase, values in self.phase_seconds.items()},
            "peak_mb": self.peak_bytes / 1e6,
            "all_step_seconds": [round(value, 2) for value in self.step_seconds],
        }


def write_inputs(folder: Path, num_steps: int) -> tuple[Path, Path]:
    """A random model with the student's tokenizer, and prompts for every step."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model, prompts = folder / "model", folder / "prompts.jsonl"
    disable_progress_bar()
    Qwen3ForCausalLM(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()[: NUM_PROMPTS * num_steps]
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return model, prompts


def run_process(command: Sequence[str], options: argparse.Namespace, *, watch_memory: bool) -> tuple[str, int]:
    """Run to the end and return what it printed, and its peak memory in bytes if that was watched.

    Raises:
        SystemExit: it failed; its last lines are shown.
    """
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")},
        "OMP_NUM_THREADS": str(options.num_threads),
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
    }
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            with PeakMemory(pid=process.pid) if watch_memory else contextlib.nullcontext() as memory:
                output, _ = process.communicate()
        finally:
            process.terminate()
        if process.returncode:
            errors.seek(0)
            sys.exit(f"{' '.join(command)} failed:\n{output[-2000:]}\n{errors.read()[-4000:]}")
    return output, memory.bytes if memory else 0


def measure_trl(
    model: Path, prompts: Path, options: argparse.Namespace, seen: Measurements, *, watch_memory: bool
) -> None:
    """One run of TRL's GRPOTrainer: for its peak memory, or for its times."""
    command = [sys.executable, str(BENCHMARKS / "trl_step.py"), "--model", str(model), "--prompts", str(prompts)]
    command += ["--steps", str(options.steps), "--warmup-steps", "1", "--new-tokens", str(options.new_tokens)]
    command += ["--prompts-per-step", str(NUM_PROMPTS), "--samples-per-prompt", str(NUM_SAMPLES)]
    command += ["--num-threads", str(options.num_threads)]
    output, peak_bytes = run_process(command, options, watch_memory=watch_memory)
    if watch_memory:
        seen.peak_bytes = peak_bytes
        return
    report = json.loads(output.splitlines()[-1])
    for step, generation in zip(report["step_seconds"], report["generation_seconds"], strict=True):
        seen.add_phases(generation=generation, update=step - generation)
    seen.step_seconds += report["step_seconds"]
    seen.step_tokens += report["completion_tokens"]


def measure_xrl(
    model: Path, prompts: Path, options: argparse.Namespace, seen: Measurements, *, watch_memory: bool
) -> None:
    """The same of ours: one rank, one rollout worker."""
    flags = {
        "model": model,
        "data": prompts,
        "num-rollouts": options.steps + 1,
        "rollout-batch-size": NUM_PROMPTS,
        "samples-per-prompt": NUM_SAMPLES,
        "max-response-length": options.new_tokens,
        "max-tokens-per-microbatch": options.max_tokens_per_microbatch,
        "max-prompt-length": 64,
        "rollout-num-workers": 1,
        "rollout-num-threads": options.num_threads,
        "lr": 1e-5,
        "old-logprobs": "rollout",
        "judge": f"{BENCHMARKS / 'distinct_letters.py'}:judge",
        "judge-num-workers": 1,
    }
    with tempfile.TemporaryDirectory() as work_dir:
        command = [sys.executable, "-m", "xrl.cli", "train", "--work-dir", work_dir, "--ignore-eos", "--no-shuffle"]
        command += ["--no-tensorboard", *(f"--{name}={value}" for name, value in flags.items())]
        _, peak_bytes = run_process(command, options, watch_memory=watch_memory)
        (metrics,) = Path(work_dir).glob("*/metrics.jsonl")
        rows = [row for row in read_rows(metrics) if "step_seconds" in row]
    if watch_memory:
        seen.peak_bytes = peak_bytes
        return
    for row in rows[1:]:
        phases = {name.removeprefix("seconds/"): row[name] for name in row if name.startswith("seconds/")}
        phases["generation"] = phases.pop("rollout")  # judging included
        seen.add_phases(**phases, other=row["step_seconds"] - sum(phases.values()))
        seen.step_seconds.append(row["step_seconds"])
        seen.step_tokens.append(int(row["response_tokens"]))


def print_table(ours: dict[str, Any], theirs: dict[str, Any], ratios: dict[str, float]) -> None:
    """Figures side by side, then where the time goes."""
    console = Console(width=100)
    table = Table(title=f"GRPO step: {NUM_PROMPTS} prompts x {NUM_SAMPLES} samples, medians")
    for column in ("", "xrl", "TRL", "xrl / TRL"):
        table.add_column(column, justify="left" if not column else "right")
    for words, key, ratio in (
        ("tokens/s, end to end", "tokens_per_s", "end_to_end_ratio"),
        ("tokens/s, generation", "generation_tokens_per_s", "generation_ratio"),
        ("peak memory, MB", "peak_mb", "memory_ratio"),
    ):
        table.add_row(words, f"{ours[key]:,.0f}", f"{theirs[key]:,.0f}", f"{ratios[ratio]:.2f}")
    console.print(table)
    for library, summary in (("xrl", ours), ("TRL", theirs)):
        phases = sorted(summary["phase_seconds"].items(), key=lambda item: -item[1])
        shares = ", ".join(f"{phase} {value:.2f} s ({value / summary['step_seconds']:.0%})" for phase, value in phases)
        console.print(f"{library}: {summary['step_seconds']:.2f} s a step: {shares}", soft_wrap=True)


def parse_options() -> argparse.Namespace:
    """What may be changed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each library, by turns")
    parser.add_argument("--steps", type=int, default=2, help="steps that count in each run")
    parser.add_argument("--new-tokens", type=int, default=128, help="length of every answer")
    parser.add_argument("--num-threads", type=int, default=2)
    parser.add_argument("--max-tokens-per-microbatch", type=int, default=2048, help="of xrl")
    return parser.parse_args()


def main() -> None:
    """Measure both by turns and print the medians."""
    options = parse_options()
    ours, theirs = Measurements(), Measurements()
    with tempfile.TemporaryDirectory() as folder:
        model, prompts = write_inputs(Path(folder), num_steps=options.steps + 1)
        for run in range(1, options.repeats + 2):
            is_last = run > options.repeats
            words = "for memory" if is_last else f"{run} of {options.repeats}"
            print(f"run {words}: TRL ...", flush=True)
            measure_trl(model, prompts, options, theirs, watch_memory=is_last)
            print(f"run {words}: xrl ...", flush=True)
            measure_xrl(model, prompts, options, ours, watch_memory=is_last)
    xrl, trl = ours.summary(), theirs.summary()
    ratios = {
        "end_to_end_ratio": xrl["tokens_per_s"] / trl["tokens_per_s"],
        "generation_ratio": xrl["generation_tokens_per_s"] / trl["generation_tokens_per_s"],
        "memory_ratio": xrl["peak_mb"] / trl["peak_mb"],
    }
    print_table(xrl, trl, ratios)
    print(json.dumps({**ratios, "xrl": xrl, "trl": trl}))


if __name__ == "__main__":
    main()
