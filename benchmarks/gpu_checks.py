"""Whether the log-prob and GRPO kernels are right on a CUDA device: what `gpu_kernels.py` checks before it measures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xrl.algorithms.loss_settings import TokenLossSettings
from xrl.kernels.head.backend import BackendName
from xrl.kernels.head.grpo_loss import grpo_token_loss, reference_grpo_token_loss
from xrl.kernels.head.linear_grpo import linear_grpo_loss, reference_linear_grpo_loss
from xrl.kernels.head.linear_logprob import linear_logprob, reference_linear_logprob
from xrl.kernels.head.logprob import reference_logprob, vocab_parallel_logprob
from xrl.kernels.head.token_inputs import TokenInputs
from xrl.kernels.shards import VocabShard

# The case file is the tests', so that every backend is held to one.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.kernels.head.logprob_cases import Case, cases

DEVICE = torch.device("cuda")
NUM_ROWS, VOCAB_SIZE = 16_384, 151_936  # more than 2^31 logits

# Rows that do not begin at multiples of 16 bytes take two passes; the others one where the device can, by a block, by a
# cluster of two (fp32), of four and of eight.
LOSS_VOCAB_SIZES = (9973, 9984, 30_008, VOCAB_SIZE)
NUM_PADDED = 3  # of these columns

# As in tests/kernels: log-probs absolute, gradients relative to the row's largest of their kind.
LOGPROB_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}

SETTINGS = {
    "plain": TokenLossSettings(),
    "clip apart, dual clip": TokenLossSettings(clip_high=0.28, dual_clip=3.0),
    "k1": TokenLossSettings(kl_coef=0.1, kl_type="k1"),
    "k2": TokenLossSettings(kl_coef=0.1, kl_type="k2"),
    "k3, entropy": TokenLossSettings(kl_coef=0.1, entropy_coef=0.05),
    "truncate": TokenLossSettings(importance_correction="truncate", importance_bound=1.5),
    "mask, everything": TokenLossSettings(
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
    options: dict[str, Any] = {"temperature": case.temperature}
    shard = VocabShard(num_columns=case.num_columns)
    out = vocab_parallel_logprob(logits, ids, shard=shard, entropy_grad=True, backend=backend, **options)
    torch.autograd.backward([out.logprob, out.entropy], grads)
    exact = logits.detach().double().requires_grad_()
    wanted = reference_logprob(exact, ids, num_columns=case.num_columns, **options)
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
        "shares": (uniform >= masked).float(),
        "old_logprobs": old,
        "rollout_logprobs": old + noise(0.3),
        "reference_logprobs": logprob - noise(0.5),
    }


def check_loss(
    settings: TokenLossSettings,
    name: str,
    vocab_size: int,
    dtype: torch.dtype,
    backend: BackendName,
    findings: Findings,
) -> None:
    """Token losses and the gradient in the logits' memory, against autograd in fp64."""
    generator = torch.Generator(DEVICE).manual_seed(4)
    leaf = (2 * torch.randn(256, vocab_size, generator=generator, device=DEVICE)).to(dtype).requires_grad_()
    num_columns = vocab_size - NUM_PADDED
    ids = torch.randint(0, num_columns, (256,), generator=generator, device=DEVICE)
    inputs = loss_inputs(leaf, ids, masked=0.2, no_advantage=0.2)
    options: dict[str, Any] = {"settings": settings, "temperature": 0.7}
    shard = VocabShard(num_columns=num_columns)
    out = grpo_token_loss(leaf * 1.0, ids, TokenInputs(**inputs), shard=shard, backend=backend, **options)
    out.token_loss.sum().backward()
    exact = leaf.detach().double().requires_grad_()
    doubles = TokenInputs(**{key: value.double() for key, value in inputs.items()})
    wanted = reference_grpo_token_loss(exact[:, :num_columns], ids, doubles, **options)
    wanted.sum().backward()
    assert leaf.grad is not None and exact.grad is not None
    loss_error = (out.token_loss.detach() - wanted.detach()).abs() / (1e-6 + 1e-4 * wanted.detach().abs())
    name = f"{name}, V = {vocab_size}, {dtype}"
    findings.add(f"loss, {name}", loss_error.amax())
    tolerance = 2e-5 if dtype == torch.float32 else 6e-3
    # The slopes of surrogate and KL may cancel, their errors do not.
    scale = exact.grad.abs().amax(1) + 0.1 * inputs["shares"]
    error = (leaf.grad.double() - exact.grad).abs().amax(1) / (tolerance * scale + 1e-9)
    findings.add(f"gradient of the loss, {name}", error.amax())


def check_linear(dtype: torch.dtype, backend: BackendName, findings: Findings) -> None:
    """Both operations from hidden states in several chunks, the weight's gradient in a buffer as Megatron has it."""
    generator = torch.Generator(DEVICE).manual_seed(7)
    hidden = torch.randn(200, 256, generator=generator, device=DEVICE).to(dtype)
    weight = (0.3 * torch.randn(9973, 256, generator=generator, device=DEVICE)).to(dtype)
    rows = torch.randint(0, 200, (256,), generator=generator, device=DEVICE)
    ids = torch.randint(0, 9973, (256,), generator=generator, device=DEVICE)
    inputs = loss_inputs(hidden.float()[rows] @ weight.float().t(), ids, masked=0.2, no_advantage=0.2)
    grad = torch.randn(256, generator=generator, device=DEVICE)
    options: dict[str, Any] = {"temperature": 0.7, "rows": rows}
    ours: dict[str, Any] = options | {"backend": backend, "chunk_bytes": 4 * 9973 * 60}
    settings = SETTINGS["k3, entropy"]

    def leaves(*, double: bool) -> tuple[Tensor, torch.nn.Parameter]:
        parameter = torch.nn.Parameter(weight.double() if double else weight.clone())
        if not double:
            parameter.main_grad = torch.zeros(weight.shape, device=DEVICE)  # type: ignore[attr-defined]
        return (hidden.double() if double else hidden.clone()).requires_grad_(), parameter

    found_hidden, found_weight = leaves(double=False)
    out = linear_logprob(found_hidden, found_weight, ids, **ours)
    out.logprob.backward(grad)
    exact_hidden, exact_weight = leaves(double=True)
    wanted = reference_linear_logprob(exact_hidden, exact_weight, ids, **options)
    wanted.logprob.backward(grad.double())
    findings.add(f"linear_logprob, {dtype}: outputs", output_error(out, wanted))
    _add_linear_gradients("linear_logprob", dtype, (found_hidden, found_weight), (exact_hidden, exact_weight), findings)

    found_hidden, found_weight = leaves(double=False)
    loss = linear_grpo_loss(found_hidden, found_weight, ids, TokenInputs(**inputs), settings, upstream=2.0, **ours).loss
    (2.0 * loss).backward()
    exact_hidden, exact_weight = leaves(double=True)
    doubles = TokenInputs(**{key: value.double() for key, value in inputs.items()})
    exact = reference_linear_grpo_loss(exact_hidden, exact_weight, ids, doubles, settings, **options)
    (2.0 * exact).backward()
    error = (loss - exact).detach().abs() / (1e-5 + 1e-4 * exact.detach().abs())
    findings.add(f"linear_grpo_loss, {dtype}: loss", error)
    _add_linear_gradients(
        "linear_grpo_loss", dtype, (found_hidden, found_weight), (exact_hidden, exact_weight), findings
    )


def _add_linear_gradients(
    name: str, dtype: torch.dtype, found: tuple[Tensor, Any], exact: tuple[Tensor, Tensor], findings: Findings
) -> None:
    tolerance = 2e-5 if dtype == torch.float32 else 8e-3
    pairs = {"hidden": (found[0].grad, exact[0].grad), "weight": (found[1].main_grad, exact[1].grad)}
    for kind, (mine, wanted) in pairs.items():
        assert mine is not None and wanted is not None
        error = (mine.double() - wanted).abs().amax() / (tolerance * wanted.abs().amax())
        findings.add(f"{name}, {dtype}: gradient of {kind}", error)


def check_repeats(backend: BackendName, findings: Findings) -> None:
    """20 runs, equal to the bit."""
    generator = torch.Generator(DEVICE).manual_seed(5)
    logits = torch.randn(64, VOCAB_SIZE, generator=generator, device=DEVICE).requires_grad_()
    ids = torch.randint(0, VOCAB_SIZE, (64,), generator=generator, device=DEVICE)
    tokens = TokenInputs(advantages=torch.randn(64, generator=generator, device=DEVICE))
    runs = []
    for _ in range(20):
        logits.grad = None
        out = vocab_parallel_logprob(logits, ids, backend=backend)
        out.logprob.sum().backward()
        loss = grpo_token_loss(logits, ids, tokens, TokenLossSettings(), in_place=False, backend=backend)
        (gradient,) = torch.autograd.grad(loss.token_loss.sum(), logits)
        runs.append((out.logprob.detach(), out.entropy.detach(), logits.grad, loss.logprob, gradient))
    same = all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))  # type: ignore[arg-type]
    findings.add("20 runs to the bit", 0.0 if same else torch.inf)


def check_backend(backend: BackendName) -> Findings:
    """Everything above; what cannot run here is wrong as well."""
    findings = Findings()

    checks: list[tuple[str, Callable[[], None]]] = [
        (case.name, partial(check_case, case, backend, findings)) for case in cases()
    ]
    for name, settings in SETTINGS.items():
        checks += [
            (f"loss, {name}", partial(check_loss, settings, name, vocab_size, dtype, backend, findings))
            for vocab_size in LOSS_VOCAB_SIZES
            for dtype in GRADIENT_TOLERANCE
        ]
    checks += [
        (f"from hidden states, {dtype}", partial(check_linear, dtype, backend, findings))
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
