"""Matrix products of a training pass, ours, oneDNN's and MKL's in turns: `python benchmarks/matmul.py`.

fp32 on the CPU, the shapes of the model in grpo_step.py: forward (x W^T), gradient of the input (g W) and gradient of
the weight (g^T x, added to what is there). Matrices change from turn to turn, so that they come from memory as they do
in a model. The last line is JSON: GFLOP/s of each, all shapes together.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from xrl.kernels.matmul import matmul, matmul_into

SHAPES = {"QKV": (512, 256), "attention out": (256, 256), "gate and up": (1536, 256), "down": (256, 768)}
KINDS = ("forward", "input gradient", "weight gradient")
NUM_COPIES = 8


def onednn(a: Tensor, b: Tensor) -> Tensor:
    """a b, as PyTorch's graph compiler calls oneDNN."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a.contiguous(), b.t(), None, "none", [], "")
    return product


def contestants(kind: str, x: list[Tensor], g: list[Tensor], weight: Tensor) -> dict[str, Callable[[int], object]]:
    """Each library's way to compute `kind`, by turn."""
    if kind == "forward":
        return {
            "ours": lambda i: matmul(x[i], weight.t()),
            "oneDNN": lambda i: onednn(x[i], weight.t()),
            "MKL": lambda i: x[i] @ weight.t(),
        }
    if kind == "input gradient":
        return {
            "ours": lambda i: matmul(g[i], weight),
            "oneDNN": lambda i: onednn(g[i], weight),
            "MKL": lambda i: g[i] @ weight,
        }
    total = torch.zeros_like(weight)
    return {
        "ours": lambda i: matmul_into(g[i].t(), x[i], total, addend=total),
        "oneDNN": lambda i: total.add_(onednn(g[i].t(), x[i])),
        "MKL": lambda i: total.addmm_(g[i].t(), x[i]),
    }


def measure(runs: dict[str, Callable[[int], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each, by turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run(turn % NUM_COPIES)
            seconds[name].append(time.perf_counter() - start)
    return {name: median(values[len(values) // 10 :]) for name, values in seconds.items()}


def main() -> None:
    """Measure, print, end with JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1088, help="tokens of a micro-batch")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--num-threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.num_threads)
    table = Table(title=f"GFLOP/s, {options.rows} rows, {options.num_threads} threads")
    for column in ("", "", "ours", "oneDNN", "MKL"):
        table.add_column(column, justify="left" if not column else "right")
    totals: dict[str, float] = {}
    flops = 0.0
    with torch.inference_mode():
        for layer, (outputs, inputs) in SHAPES.items():
            x = [torch.randn(options.rows, inputs) for _ in range(NUM_COPIES)]
            g = [torch.randn(options.rows, outputs) for _ in range(NUM_COPIES)]
            weight = torch.randn(outputs, inputs)
            for kind in KINDS:
                seconds = measure(contestants(kind, x, g, weight), options.repeats)
                work = 2.0 * options.rows * outputs * inputs
                flops += work
                for name, value in seconds.items():
                    totals[name] = totals.get(name, 0.0) + value
                table.add_row(layer, kind, *(f"{work / value / 1e9:.0f}" for value in seconds.values()))
    Console(width=100).print(table)
    print(json.dumps({f"{name.lower()}_gflops": round(flops / value / 1e9, 1) for name, value in totals.items()}))


if __name__ == "__main__":
    main()
