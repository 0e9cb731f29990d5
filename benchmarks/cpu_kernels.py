"""Log-prob kernels on the CPU against PyTorch, eager and compiled: `python benchmarks/cpu_kernels.py`.

Log-prob and entropy of 2,048 rows at V = 32,768 and 151,936 in fp32 and bf16, forward alone and with the gradient of
the log-prob; all contestants by turns in one run, on 2 threads. The read floor is the time in which PyTorch's integer
maximum, which is as fast as the memory, reads the same logits once. The allocator keeps what is freed (MALLOC_*
variables, set by this script), as those do that people use to train on CPUs: a gradient from memory that is fresh
from the system costs several times its computation in page faults, of which who wins is a matter of luck.

Then log-probs from hidden states, with the gradients of hidden states and weight, in fp32: each contestant in a process
of its own, by turns, with its peak memory. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from xrl.kernels.head.logprob import vocab_parallel_logprob

NUM_ROWS = 2048
VOCABULARIES = (32_768, 151_936)
DTYPES = (torch.float32, torch.bfloat16)

KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
WORKER = Path(__file__).with_name("linear_worker.py")
LINEAR_CONTESTANTS = ("xrl logprob", "xrl grpo", "compile", "eager")
LINEAR_CASES = (
    {"rows": 8192, "hidden-size": 256, "vocab-size": 32_768},
    {"rows": 1024, "hidden-size": 256, "vocab-size": 151_936},
)

Contestant = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def ours(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    out = vocab_parallel_logprob(logits, token_ids)
    return out.logprob, out.entropy


def eager(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """As a training script writes it; the entropy is only looked at."""
    logp = logits.float().log_softmax(1)
    with torch.no_grad():
        entropy = -(logp.exp() * logp).sum(1)
    return logp.gather(1, token_ids[:, None])[:, 0], entropy


def forward(contestant: Contestant, logits: Tensor, token_ids: Tensor) -> None:
    with torch.no_grad():
        contestant(logits, token_ids)


def forward_backward(contestant: Contestant, logits: Tensor, token_ids: Tensor) -> None:
    contestant(logits, token_ids)[0].sum().backward()
    logits.grad = None  # here, so that giving back a gradient's memory is on the account of who took it


def by_turns(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each call, after one that does not count.

    They take turns, so that drift hits them all, and each turn begins with another one: what memory costs depends on
    who gave some back before.
    """
    milliseconds: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(repeats + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            calls[name]()
            if turn:
                milliseconds[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(values) for name, values in milliseconds.items()}


def measure(dtype: torch.dtype, vocab_size: int, repeats: int) -> dict[str, float]:
    """Milliseconds by contestant and pass, and of the read floor."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(NUM_ROWS, vocab_size, generator=generator).to(dtype).requires_grad_()
    token_ids = torch.randint(0, vocab_size, (NUM_ROWS,), generator=generator)
    torch.compiler.reset()
    contestants: dict[str, Contestant] = {"xrl": ours, "compile": torch.compile(eager, dynamic=False), "eager": eager}
    words = logits.detach().view(torch.int32).flatten()
    calls: dict[str, Callable[[], Any]] = {"read": words.max}
    for name, contestant in contestants.items():
        calls[f"{name} forward"] = lambda contestant=contestant: forward(contestant, logits, token_ids)  # type: ignore[misc]
        calls[f"{name} both"] = lambda contestant=contestant: forward_backward(contestant, logits, token_ids)  # type: ignore[misc]
    return by_turns(calls, repeats)


def measure_linear(case: Mapping[str, int], options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median milliseconds and peak MB of each contestant, after a call that does not count."""
    flags = [f"--{name}={value}" for name, value in case.items()]
    # Peaks of memory are told apart only where it is given back.
    usual = {name: value for name, value in os.environ.items() if name not in KEEP_MEMORY}
    environment = {**usual, "OMP_NUM_THREADS": str(options.num_threads), "OMP_WAIT_POLICY": "passive"}
    workers = {
        name: subprocess.Popen(
            [sys.executable, str(WORKER), "--contestant", name, f"--num-threads={options.num_threads}", *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for name in LINEAR_CONTESTANTS
    }
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    for turn in range(options.linear_repeats + 1):
        for name, worker in workers.items():
            assert worker.stdin is not None and worker.stdout is not None
            worker.stdin.write("\n")
            worker.stdin.flush()
            answer = worker.stdout.readline()
            if not answer:
                sys.exit(f"linear_worker.py --contestant '{name}' ended with exit code {worker.wait()}")
            if turn:
                seen[name].append(json.loads(answer))
    for worker in workers.values():
        worker.communicate()
    return {
        name: {
            "milliseconds": 1e3 * median(call["seconds"] for call in calls),
            "peak_mb": median(call["peak_bytes"] for call in calls) / 1e6,
        }
        for name, calls in seen.items()
    }


def print_linear(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    table = Table(title="from hidden states, both gradients, fp32 (medians)")
    for column in ("", *LINEAR_CONTESTANTS):
        table.add_column(column, justify="left" if not column else "right")
    for case, found in results.items():
        for key, words in (("milliseconds", "milliseconds"), ("peak_mb", "peak memory, MB")):
            table.add_row(f"{case}, {words}", *(f"{found[name][key]:,.0f}" for name in LINEAR_CONTESTANTS))
    Console(width=120).print(table)


def keep_memory() -> None:
    """Start again with an allocator that gives nothing back to the system; it reads its settings at the start."""
    if not KEEP_MEMORY.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_MEMORY)


def main() -> None:
    """Measure all cases and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="calls of each contestant that count, by turns")
    parser.add_argument("--linear-repeats", type=int, default=3)
    parser.add_argument("--num-threads", type=int, default=2)
    options = parser.parse_args()
    keep_memory()
    torch.set_num_threads(options.num_threads)
    results = {
        f"{str(dtype).removeprefix('torch.')} {vocab_size}": measure(dtype, vocab_size, options.repeats)
        for dtype in DTYPES
        for vocab_size in VOCABULARIES
    }
    table = Table(title=f"log-prob and entropy, {NUM_ROWS} rows, milliseconds (medians)")
    for column in ("", "xrl", "compile", "eager", "compile / xrl", "xrl / read floor"):
        table.add_column(column, justify="left" if not column else "right")
    for case, found in results.items():
        for which, words in (("forward", "forward"), ("both", "forward + backward")):
            mine, compiled, plain = (found[f"{name} {which}"] for name in ("xrl", "compile", "eager"))
            floor = f"{mine / found['read']:.2f}" if which == "forward" else ""
            row = (f"{mine:.1f}", f"{compiled:.1f}", f"{plain:.1f}", f"{compiled / mine:.2f}", floor)
            table.add_row(f"{case}, {words}", *row)
    Console(width=120).print(table)

    linear = {f"{case['rows']} rows, V = {case['vocab-size']}": measure_linear(case, options) for case in LINEAR_CASES}
    print_linear(linear)
    small, large = linear.values()

    def ratios(rival: str) -> list[float]:
        return [found[f"{rival} both"] / found["xrl both"] for found in results.values()]

    def over_floor(dtype: str) -> float:
        return max(found["xrl forward"] / found["read"] for case, found in results.items() if case.startswith(dtype))

    figures = {
        "min_forward_backward_vs_compile": min(ratios("compile")),
        "min_forward_backward_vs_eager": min(ratios("eager")),
        "bf16_forward_vs_read_floor": over_floor("bfloat16"),
        "fp32_forward_vs_read_floor": over_floor("float32"),
        "linear_memory_ratio": small["eager"]["peak_mb"] / small["xrl logprob"]["peak_mb"],
        "linear_speed_vs_compile": small["compile"]["milliseconds"] / small["xrl logprob"]["milliseconds"],
        "linear_large_vocab_memory_ratio": large["eager"]["peak_mb"] / large["xrl logprob"]["peak_mb"],
        "milliseconds": results,
        "linear": linear,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
