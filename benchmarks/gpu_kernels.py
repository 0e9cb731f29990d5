"""Log-prob and GRPO kernels on a CUDA device: right, and how fast: `python benchmarks/gpu_kernels.py`.

First every backend that runs here is held against PyTorch in fp64: the case file of the tests, many rows, more than
2^31 logits, the settings of the loss, 20 runs to the bit. Then times at 16,384 rows and V = 151,936 in bf16: backends,
eager PyTorch, `torch.compile` and Liger's Triton kernels where they are installed, all by turns in one run, the L2
cache overwritten before each call, beside what the device reads, copies and multiplies; then the loss from hidden
states (hidden size 4,096) with its peak memory. Takes some minutes and up to 80 GB; what cannot run is left out, with a
line. The last line is JSON; exit code 1 says that a result was wrong, 2 that there is no device.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any
from unittest import mock

import torch
from gpu_checks import DEVICE, NUM_ROWS, VOCAB_SIZE, Findings, check_backend, loss_inputs
from rich.console import Console
from rich.table import Table
from torch import Tensor

from xrl.algorithms.loss_settings import TokenLossSettings
from xrl.kernels.head import grpo_loss as loss_module
from xrl.kernels.head.backend import BackendName, SinglePassBackend, choose_backend, why_not
from xrl.kernels.head.grpo_loss import grpo_token_loss
from xrl.kernels.head.linear_grpo import linear_grpo_loss
from xrl.kernels.head.linear_logprob import linear_logprob
from xrl.kernels.head.logprob import vocab_parallel_logprob
from xrl.kernels.head.token_inputs import TokenInputs

NUM_SEQUENCES, LENGTH = 16, NUM_ROWS // 16
HIDDEN_SIZE = 4096
FLUSH_BYTES = 4 << 30  # far more than L2, and long enough for Python to queue the call that is timed
BACKENDS: tuple[BackendName, ...] = ("native", "triton")

TIMED = TokenLossSettings(clip_low=0.2, clip_high=0.28, kl_coef=0.04)
WITHOUT_KL = TokenLossSettings(clip_low=0.2, clip_high=0.28)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What all contestants get. Liger wants a row behind each sequence: others take the first NUM_ROWS rows."""

    stored: Tensor  # [NUM_SEQUENCES * (LENGTH + 1), V] bf16, never overwritten
    work: Tensor  # the same, a copy that may be
    ids: Tensor  # [NUM_ROWS]
    inputs: dict[str, Any]  # of the loss, [NUM_ROWS]
    sparse: dict[str, Any]  # the same with half of the rows masked, and 3 in 10 without an advantage

    @property
    def rows(self) -> Tensor:
        return self.stored[:NUM_ROWS]


def eager_logprob(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """As a training script writes it."""
    logp = logits.float().log_softmax(1)
    return logp.gather(1, ids[:, None])[:, 0], -(logp.exp() * logp).sum(1)


def eager_loss(logits: Tensor, ids: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """The loss of TIMED as a training script writes it."""
    logp = logits.float().log_softmax(1).gather(1, ids[:, None])[:, 0]
    ratio = (logp - inputs["old_logprobs"]).exp()
    bounded = ratio.clamp(1 - TIMED.clip_low, 1 + TIMED.clip_high)
    log_ratio = inputs["reference_logprobs"] - logp
    kl = log_ratio.exp() - log_ratio - 1
    surrogate = torch.maximum(-inputs["advantages"] * ratio, -inputs["advantages"] * bounded)
    return inputs["shares"] * (surrogate + TIMED.kl_coef * kl)


def liger() -> Any:
    """Liger's module with the GRPO kernels, or None."""
    with suppress(ImportError):
        from liger_kernel.transformers import grpo_loss

        return grpo_loss
    return None


def liger_loss(batch: Batch, logits: Tensor) -> Tensor:
    """The loss of TIMED; Liger's advantages are per sequence."""

    def shaped(name: str) -> Tensor:
        return batch.inputs[name].view(NUM_SEQUENCES, LENGTH)

    loss: Tensor = liger().triton_grpo_loss(
        logits.view(NUM_SEQUENCES, LENGTH + 1, VOCAB_SIZE),
        shaped("old_logprobs"),
        shaped("reference_logprobs"),
        batch.ids.view(NUM_SEQUENCES, LENGTH),
        shaped("advantages")[:, 0].contiguous(),
        shaped("shares"),
        temperature=1.0,
        beta=TIMED.kl_coef,
        eps_low=TIMED.clip_low,
        eps_high=TIMED.clip_high,
        inplace=True,
    )[0]
    return loss


def our_loss(
    batch: Batch,
    inputs: Mapping[str, Any],
    settings: TokenLossSettings,
    backend: BackendName,
    logits: Tensor,
    *,
    upstream: float | None = None,
) -> Tensor:
    tokens = TokenInputs(**inputs)
    return grpo_token_loss(logits, batch.ids, tokens, settings, backend=backend, upstream=upstream).token_loss


def in_two_passes(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """As where ranks share the vocabulary. That a cluster of blocks holds a row pays if this takes longer."""
    with mock.patch.object(loss_module, "SinglePassBackend", int):  # which is no backend
        return loss(logits)


def forward_contestants(batch: Batch, backends: list[BackendName]) -> dict[str, Callable[[], Any]]:
    """Log-prob and entropy of all rows."""
    calls: dict[str, Callable[[], Any]] = {
        f"xrl {name}": partial(vocab_parallel_logprob, batch.rows, batch.ids, backend=name) for name in backends
    }
    calls["torch.compile"] = partial(torch.compile(eager_logprob, dynamic=False), batch.rows, batch.ids)
    calls["eager"] = partial(eager_logprob, batch.rows, batch.ids)
    if liger():
        from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

        logits = batch.stored.view(NUM_SEQUENCES, LENGTH + 1, VOCAB_SIZE)
        ids = batch.ids.view(NUM_SEQUENCES, LENGTH)
        calls["liger, no entropy"] = partial(fused_selective_log_softmax, logits, ids, 1.0)
    return calls


def loss_contestants(batch: Batch, backends: list[BackendName]) -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    """By name a function from logits to token losses, and the logits, which it may overwrite."""
    rows = batch.work[:NUM_ROWS]
    compiled = torch.compile(eager_loss, dynamic=False)
    calls: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
        "torch.compile": (lambda logits: compiled(logits, batch.ids, batch.inputs), rows),
        "eager": (lambda logits: eager_loss(logits, batch.ids, batch.inputs), rows),
    }
    for name in backends:
        calls[f"xrl {name}"] = partial(our_loss, batch, batch.inputs, TIMED, name), rows
        # As the trainer calls it, which knows what its backward pass brings; the others multiply the gradient by it.
        calls[f"xrl {name}, upstream known"] = partial(our_loss, batch, batch.inputs, TIMED, name, upstream=1.0), rows
        calls[f"xrl {name}, 1 row in 5 live"] = partial(our_loss, batch, batch.sparse, WITHOUT_KL, name), rows
        if isinstance(choose_backend(name, device=DEVICE, dtype=rows.dtype), SinglePassBackend):
            calls[f"xrl {name}, two passes"] = partial(in_two_passes, calls[f"xrl {name}"][0]), rows
    if liger():
        calls["liger"] = partial(liger_loss, batch), batch.work
    return calls


def milliseconds_by_turns(
    calls: Mapping[str, Callable[[], Any]], repeats: int, prepare: Callable[[], Any] | None = None
) -> dict[str, float]:
    """Median milliseconds of each call on the device, after two that do not count; what cannot run is left out."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=DEVICE)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 2):
        for name in list(times):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if prepare is not None:
                prepare()
            flush.zero_()
            start.record()
            try:
                calls[name]()
            except (RuntimeError, TypeError) as error:  # too little memory, or a rival of another version
                print(f"{name}: left out, {error}")
                del times[name]
                torch.cuda.empty_cache()
                continue
            end.record()
            end.synchronize()
            if turn >= 2:
                times[name].append(start.elapsed_time(end))
    return {name: median(values) for name, values in times.items()}


def forward(loss: Callable[[Tensor], Tensor], logits: Tensor) -> None:
    """With the gradient's part of it: ours forms the gradient here."""
    loss(logits.detach().requires_grad_())


def forward_backward(loss: Callable[[Tensor], Tensor], logits: Tensor) -> None:
    leaf = logits.detach().requires_grad_()
    # Not backward(), which might copy the gradient into a place of its own.
    torch.autograd.grad(loss(leaf).sum(), leaf)


def ceilings(batch: Batch, repeats: int) -> dict[str, float]:
    """TB/s that PyTorch reads and copies, TFLOP/s of the product that makes these logits."""
    words = batch.rows.view(torch.float32).flatten()
    hidden = torch.randn(NUM_ROWS, HIDDEN_SIZE, dtype=torch.bfloat16, device=DEVICE)
    weight = torch.randn(VOCAB_SIZE, HIDDEN_SIZE, dtype=torch.bfloat16, device=DEVICE)
    logits = batch.work[:NUM_ROWS]
    calls: dict[str, Callable[[], Any]] = {
        "sum": words.sum,
        "maximum": words.amax,
        "copy": lambda: logits.copy_(batch.rows),
        "product": lambda: torch.matmul(hidden, weight.t(), out=logits),
    }
    times = milliseconds_by_turns(calls, repeats)
    terabytes = batch.rows.numel() * batch.rows.element_size() / 1e12
    return {
        "read_TB_per_s": 1e3 * terabytes / min(times["sum"], times["maximum"]),
        "copy_TB_per_s": 2e3 * terabytes / times["copy"],
        "product_TFLOP_per_s": 2e-9 * NUM_ROWS * VOCAB_SIZE * HIDDEN_SIZE / times["product"],
    }


def measure(backends: list[BackendName], repeats: int) -> dict[str, dict[str, float]]:
    """Ceilings, and milliseconds of log-prob, of the loss, and of the loss with its gradient."""
    generator = torch.Generator(DEVICE).manual_seed(6)
    stored = torch.empty(NUM_ROWS + NUM_SEQUENCES, VOCAB_SIZE, dtype=torch.bfloat16, device=DEVICE)
    stored.normal_(0.0, 3.0, generator=generator)
    ids = torch.randint(0, VOCAB_SIZE, (NUM_ROWS,), generator=generator, device=DEVICE)
    rows = stored[:NUM_ROWS]
    batch = Batch(
        stored=stored,
        work=stored.clone(),
        ids=ids,
        inputs=without_rollout(loss_inputs(rows, ids)),
        sparse=without_rollout(loss_inputs(rows, ids, masked=0.5, no_advantage=0.3)),
    )
    found = {"ceilings": ceilings(batch, repeats)}
    with torch.no_grad():
        found["log-prob and entropy"] = milliseconds_by_turns(forward_contestants(batch, backends), repeats)
    losses = loss_contestants(batch, backends)

    def restore() -> None:
        batch.work.copy_(batch.stored)

    passes = {"GRPO loss, forward": forward, "GRPO loss, forward + backward": forward_backward}
    for name, run in passes.items():
        calls = {each: partial(run, *losses[each]) for each in losses}
        found[name] = milliseconds_by_turns(calls, repeats, restore)
    return found


def measure_linear(backends: list[BackendName], repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds and peak GB of the loss with both gradients, from hidden states of NUM_ROWS rows."""
    generator = torch.Generator(DEVICE).manual_seed(8)
    hidden = torch.randn(NUM_ROWS, HIDDEN_SIZE, generator=generator, device=DEVICE).bfloat16().requires_grad_()
    weight = torch.nn.Parameter(
        torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=generator, device=DEVICE).mul_(0.02).bfloat16()
    )
    weight.main_grad = torch.zeros(weight.shape, device=DEVICE)  # type: ignore[attr-defined]
    ids = torch.randint(0, VOCAB_SIZE, (NUM_ROWS,), generator=generator, device=DEVICE)
    with torch.no_grad():
        old = linear_logprob(hidden, weight, ids).logprob
    noise = torch.randn(NUM_ROWS, generator=generator, device=DEVICE)
    inputs = {"old_logprobs": old - 0.1 * noise, "reference_logprobs": old - 0.1 * noise.flip(0)}
    inputs |= {"advantages": noise.sign(), "shares": torch.ones_like(noise)}
    live = torch.rand(NUM_ROWS, generator=generator, device=DEVICE)
    sparse = inputs | {"shares": (live < 0.5).float(), "advantages": noise.sign() * (live >= 0.15)}

    def ours(backend: BackendName, rows: dict[str, Any], settings: TokenLossSettings) -> None:
        tokens = TokenInputs(**rows)
        out = linear_grpo_loss(hidden, weight, ids, tokens, settings, upstream=1.0, backend=backend)
        torch.autograd.grad(out.loss, hidden)

    def whole(loss: Callable[..., Tensor]) -> None:
        torch.autograd.grad(loss(hidden @ weight.t(), ids, inputs).sum(), (hidden, weight))

    compiled = torch.compile(eager_loss, dynamic=False)
    calls: dict[str, Callable[[], Any]] = {f"xrl {name}": partial(ours, name, inputs, TIMED) for name in backends}
    calls |= {f"xrl {name}, 7 rows in 20 live": partial(ours, name, sparse, WITHOUT_KL) for name in backends}
    calls |= {"torch.compile": partial(whole, compiled), "eager": partial(whole, eager_loss)}
    peaks: dict[str, float] = {}
    for name, call in calls.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with suppress(torch.cuda.OutOfMemoryError):
            call()
            peaks[name] = (torch.cuda.max_memory_allocated() - before) / 1e9
    times = milliseconds_by_turns(calls, max(3, repeats // 4))
    return {"loss from hidden states, forward + backward": times, "peak GB from hidden states": peaks}


def without_rollout(inputs: dict[str, Any]) -> dict[str, Any]:
    """Nothing that is timed weighs by rollout probabilities."""
    return {name: value for name, value in inputs.items() if name != "rollout_logprobs"}


def print_tables(findings: Mapping[str, Findings], found: Mapping[str, Mapping[str, float]]) -> None:
    console = Console(width=120)
    for backend, each in findings.items():
        counts = f"{each.num_checks} checks, {len(each.wrong)} wrong"
        console.print(f"{backend}: {counts}, worst error {each.worst:.2f} of what is allowed")
        for line in each.wrong:
            console.print(f"  {line}", markup=False)
    limits = found["ceilings"]
    console.print(", ".join(f"{name} {value:.2f}" for name, value in limits.items()))
    terabytes = 2e-12 * NUM_ROWS * VOCAB_SIZE
    table = Table(title=f"{NUM_ROWS} rows, V = {VOCAB_SIZE}, bf16, milliseconds (medians)")
    for column in ("", "", "ms", "over one read", "over read + write"):
        table.add_column(column, justify="right" if column else "left")
    read, both = 1e3 * terabytes / limits["read_TB_per_s"], 2e3 * terabytes / limits["copy_TB_per_s"]
    for case, times in found.items():
        if case == "ceilings":
            continue
        if case.startswith("peak"):
            console.print(f"{case}: " + ", ".join(f"{name} {value:.2f}" for name, value in times.items()))
            continue
        for name, value in times.items():
            table.add_row(case, name, f"{value:.2f}", f"{value / read:.2f}", f"{value / both:.2f}")
            case = ""
    console.print(table)


def main() -> None:
    """Check, measure, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20, help="calls of each contestant that count, by turns")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("This benchmark needs a CUDA device, and torch finds none.", file=sys.stderr)
        sys.exit(2)
    begin = time.perf_counter()
    backends = [name for name in BACKENDS if not why_not(name, DEVICE)]
    for name in BACKENDS:
        if name not in backends:
            print(f"{name}: left out, {why_not(name, DEVICE)}")
    if not liger():
        print("liger: left out, liger-kernel is not installed")
    findings: dict[str, Findings] = {name: check_backend(name) for name in backends}
    torch.cuda.empty_cache()
    found = measure(backends, options.repeats)
    torch.cuda.empty_cache()
    found |= measure_linear(backends, options.repeats)
    print_tables(findings, found)
    figures = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - begin),
        "checks": {name: vars(each) for name, each in findings.items()},
        **found,
    }
    print(json.dumps(figures))
    sys.exit(1 if any(each.wrong for each in findings.values()) else 0)


if __name__ == "__main__":
    main()
