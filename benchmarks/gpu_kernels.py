"""Log-prob and GRPO kernels on a CUDA device: right, and how fast: `python benchmarks/gpu_kernels.py`.

First every backend that runs here is held against PyTorch in fp64: the case file of the tests, many rows, more than
2^31 logits, the settings of the loss, 20 runs to the bit. Then times at 16,384 rows and V = 151,936 in bf16: backends,
eager PyTorch, `torch.compile` and Liger's Triton kernels where they are installed, all by turns in one run, the L2
cache overwritten before each call, beside what the device reads, copies and multiplies. Takes some minutes and up to
80 GB; what cannot run is left out, with a line. The last line is JSON; exit code 1 says that a result was wrong, 2 that
there is no device.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from xrl.config import AlgorithmConfig
from xrl.kernels.backend import BackendName, why_not
from xrl.kernels.grpo_loss import grpo_token_loss, reference_grpo_token_loss
from xrl.kernels.logprob import reference_logprob, vocab_parallel_logprob

# The case file is the tests', so that every backend is held to one.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.kernels.logprob_cases import Case, cases

NUM_SEQUENCES, LENGTH = 16, 1024
NUM_ROWS, VOCAB_SIZE, HIDDEN_SIZE = NUM_SEQUENCES * LENGTH, 151_936, 4096
FLUSH_BYTES = 4 << 30  # far more than L2, and long enough for Python to queue the call that is timed
DEVICE = torch.device("cuda")
BACKENDS: tuple[BackendName, ...] = ("native", "triton")

# As in tests/kernels: log-probs absolute, gradients relative to the row's largest of their kind.
LOGPROB_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}

TIMED = AlgorithmConfig(clip_low=0.2, clip_high=0.28, kl_coef=0.04)
WITHOUT_KL = AlgorithmConfig(clip_low=0.2, clip_high=0.28)
CONFIGS = {
    "plain": AlgorithmConfig(),
    "clip apart, dual clip": AlgorithmConfig(clip_high=0.28, dual_clip=3.0),
    "k1": AlgorithmConfig(kl_coef=0.1, kl_type="k1"),
    "k2": AlgorithmConfig(kl_coef=0.1, kl_type="k2"),
    "k3, entropy": AlgorithmConfig(kl_coef=0.1, entropy_coef=0.05),
    "truncate": AlgorithmConfig(importance_correction="truncate", importance_bound=1.5),
    "mask, everything": AlgorithmConfig(
        dual_clip=2.0, kl_coef=0.2, entropy_coef=0.01, importance_correction="mask", importance_bound=2.0
    ),
}


@dataclass(kw_only=True)
class Findings:
    """What the checks of one backend found; errors are fractions of what is allowed."""

    num_checks: int = 0
    worst: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def add(self, name: str, error: Tensor | float) -> None:
        value = float(error)
        self.num_checks += 1
        # NaN is neither larger nor smaller than anything.
        if not value <= 1.0:
            self.wrong.append(f"{name}: {value:.3g} times what is allowed")
        else:
            self.worst = max(self.worst, value)


def on_device(tensor: Tensor) -> Tensor:
    """A copy on the device with the same strides and the same offset from its storage's start."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    offset = tensor.storage_offset()
    storage = torch.full((offset + max(span, 0),), torch.nan, dtype=tensor.dtype, device=DEVICE)
    return storage.as_strided(tensor.shape, tensor.stride(), offset).copy_(tensor)


def check_case(case: Case, backend: BackendName, findings: Findings) -> None:
    """Outputs and both gradients of one case of the tests."""
    logits, ids = on_device(case.logits).requires_grad_(), case.token_ids.to(DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(1)
    grads = [scale * torch.randn(len(ids), generator=generator, device=DEVICE) for scale in (1.0, 0.1)]
    options: dict[str, Any] = {"temperature": case.temperature, "num_columns": case.num_columns}
    out = vocab_parallel_logprob(logits, ids, entropy_grad=True, backend=backend, **options)
    torch.autograd.backward([out.logprob, out.entropy], grads)
    exact = logits.detach().double().requires_grad_()
    wanted = reference_logprob(exact, ids, **options)
    torch.autograd.backward([wanted.logprob, wanted.entropy], [grad.double() for grad in grads])
    assert logits.grad is not None and exact.grad is not None

    findings.add(f"{case.name}: outputs", output_error(out, wanted))
    if case.finite and len(ids):
        errors = gradient_errors(
            logits.grad[:, : case.num_columns],
            exact.grad[:, : case.num_columns],
            ids,
            (grads[0].abs() + grads[1].abs()) / case.temperature,
        )
        for name, error in errors.items():
            findings.add(f"{case.name}: gradient {name}", error)
        if case.num_columns is not None:
            findings.add(f"{case.name}: padding", (logits.grad[:, case.num_columns :] != 0).sum())


def output_error(out: Any, wanted: Any) -> Tensor:
    """Largest error of log-probs, entropies and log-sum-exps over what is allowed; infinities and NaN must match."""
    worst = torch.zeros((), device=DEVICE, dtype=torch.float64)
    for name in ("logprob", "entropy", "logsumexp"):
        found, exact = getattr(out, name).detach().double(), getattr(wanted, name).detach()
        relative = 1e-5 if name == "entropy" else 1e-6
        error = (found - exact).abs() / (LOGPROB_TOLERANCE + relative * exact.abs())
        same = (found == exact) | (found.isnan() & exact.isnan())
        worst = torch.cat([worst[None], torch.where(same, 0.0, error)]).amax()
    return worst


def gradient_errors(found: Tensor, exact: Tensor, ids: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """Largest error over what is allowed, apart for targets, whose gradients are far larger, and the rest."""
    tolerance, target = GRADIENT_TOLERANCE[found.dtype], ids.long()[:, None]
    error = (found.double() - exact).abs()
    rest = exact.abs().scatter(1, target, 0.0).amax(1, keepdim=True)
    return {
        "on target": (error.gather(1, target) / (tolerance * scale[:, None])).amax(),
        "off target": (error.scatter(1, target, 0.0) / (tolerance * rest + 1e-12)).amax(),
    }


def check_many(num_rows: int, vocab_size: int, backend: BackendName, findings: Findings) -> None:
    """More rows than a grid's second dimension, or more logits than 32 bits count; compared some rows at a time."""
    name = f"{num_rows} x {vocab_size}"
    generator = torch.Generator(DEVICE).manual_seed(2)
    logits = torch.empty(num_rows, vocab_size, dtype=torch.bfloat16, device=DEVICE)
    logits.normal_(0.0, 3.0, generator=generator).requires_grad_()
    ids = torch.randint(0, vocab_size, (num_rows,), generator=generator, device=DEVICE)
    grad = torch.randn(num_rows, generator=generator, device=DEVICE)
    out = vocab_parallel_logprob(logits, ids, backend=backend)
    out.logprob.backward(grad)
    assert logits.grad is not None
    worst: dict[str, float] = {}
    for rows in torch.arange(num_rows).split(max(1, (1 << 26) // vocab_size)):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        exact = logits.detach()[part].double().requires_grad_()
        wanted = reference_logprob(exact, ids[part])
        wanted.logprob.backward(grad[part].double())
        assert exact.grad is not None
        errors = gradient_errors(logits.grad[part], exact.grad, ids[part], grad[part].abs())
        errors["outputs"] = ((out.logprob[part].detach() - wanted.logprob.detach()).abs() / LOGPROB_TOLERANCE).amax()
        for kind, error in errors.items():
            worst[kind] = max(worst.get(kind, 0.0), float(error)) if float(error) == float(error) else torch.nan
    for kind, value in worst.items():
        findings.add(f"{name}: {kind}", value)


def loss_inputs(logits: Tensor, ids: Tensor, *, masked: float = 0.0, no_advantage: float = 0.0) -> dict[str, Any]:
    """Old log-probs on both sides of every bound; `masked` and `no_advantage` are shares of the rows."""
    generator = torch.Generator(DEVICE).manual_seed(3)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(len(ids), generator=generator, device=DEVICE)

    logprob = vocab_parallel_logprob(logits.detach(), ids).logprob
    old = logprob - noise(0.4)
    uniform = torch.rand(len(ids), generator=generator, device=DEVICE)
    return {
        "advantages": noise(1.0) * ((uniform < masked) | (uniform >= masked + no_advantage)),
        "weights": (uniform >= masked).float(),
        "old_logprobs": old,
        "rollout_logprobs": old + noise(0.3),
        "reference_logprobs": logprob - noise(0.5),
    }


def check_loss(
    config: AlgorithmConfig, name: str, dtype: torch.dtype, backend: BackendName, findings: Findings
) -> None:
    """Token losses and the gradient in the logits' memory, against autograd in fp64."""
    generator = torch.Generator(DEVICE).manual_seed(4)
    leaf = (2 * torch.randn(256, 9973, generator=generator, device=DEVICE)).to(dtype).requires_grad_()
    ids = torch.randint(0, 9973, (256,), generator=generator, device=DEVICE)
    inputs = loss_inputs(leaf, ids, masked=0.2, no_advantage=0.2)
    out = grpo_token_loss(leaf * 1.0, ids, config=config, temperature=0.7, backend=backend, **inputs)
    out.token_loss.sum().backward()
    exact = leaf.detach().double().requires_grad_()
    doubles = {key: value.double() for key, value in inputs.items()}
    wanted = reference_grpo_token_loss(exact, ids, config=config, temperature=0.7, **doubles)
    wanted.sum().backward()
    assert leaf.grad is not None and exact.grad is not None
    loss_error = (out.token_loss.detach() - wanted.detach()).abs() / (1e-6 + 1e-4 * wanted.detach().abs())
    findings.add(f"loss, {name}, {dtype}", loss_error.amax())
    tolerance = 2e-5 if dtype == torch.float32 else 6e-3
    # The slopes of surrogate and KL may cancel, their errors do not.
    scale = exact.grad.abs().amax(1) + 0.1 * inputs["weights"]
    error = (leaf.grad.double() - exact.grad).abs().amax(1) / (tolerance * scale + 1e-9)
    findings.add(f"gradient of the loss, {name}, {dtype}", error.amax())


def check_repeats(backend: BackendName, findings: Findings) -> None:
    """20 runs, equal to the bit."""
    generator = torch.Generator(DEVICE).manual_seed(5)
    logits = torch.randn(64, VOCAB_SIZE, generator=generator, device=DEVICE).requires_grad_()
    ids = torch.randint(0, VOCAB_SIZE, (64,), generator=generator, device=DEVICE)
    runs = []
    for _ in range(20):
        logits.grad = None
        out = vocab_parallel_logprob(logits, ids, backend=backend)
        out.logprob.sum().backward()
        runs.append((out.logprob.detach(), out.entropy.detach(), logits.grad))
    same = all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))  # type: ignore[arg-type]
    findings.add("20 runs to the bit", 0.0 if same else torch.inf)


def check_backend(backend: BackendName) -> Findings:
    """Everything above; what cannot run here is wrong as well."""
    findings = Findings()

    checks: list[tuple[str, Callable[[], None]]] = [
        (case.name, partial(check_case, case, backend, findings)) for case in cases()
    ]
    for name, config in CONFIGS.items():
        checks += [
            (f"loss, {name}", partial(check_loss, config, name, dtype, backend, findings))
            for dtype in GRADIENT_TOLERANCE
        ]
    checks += [
        ("repeats", partial(check_repeats, backend, findings)),
        ("many rows", partial(check_many, 70_000, 1000, backend, findings)),
        ("more than 2^31 logits", partial(check_many, NUM_ROWS, VOCAB_SIZE, backend, findings)),
    ]
    for name, check in checks:
        try:
            check()
        except torch.cuda.OutOfMemoryError:
            print(f"{backend}: {name}: left out, not enough memory")
        except (RuntimeError, ValueError) as error:
            findings.wrong.append(f"{name}: {error}")
    return findings


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
    return inputs["weights"] * (surrogate + TIMED.kl_coef * kl)


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
        shaped("weights"),
        temperature=1.0,
        beta=TIMED.kl_coef,
        eps_low=TIMED.clip_low,
        eps_high=TIMED.clip_high,
        inplace=True,
    )[0]
    return loss


def our_loss(
    batch: Batch, inputs: Mapping[str, Any], config: AlgorithmConfig, backend: BackendName, logits: Tensor
) -> Tensor:
    return grpo_token_loss(logits, batch.ids, config=config, backend=backend, **inputs).token_loss


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
        calls[f"xrl {name}, 1 row in 5 live"] = partial(our_loss, batch, batch.sparse, WITHOUT_KL, name), rows
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
