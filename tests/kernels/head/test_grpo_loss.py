"""`grpo_token_loss` on every backend of the CPU, against `xrl.algorithms.token_terms` and autograd in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.head.loss_calls import call_loss
from xrl.algorithms.loss_settings import TokenLossSettings
from xrl.kernels.head import grpo_loss, native_cpu
from xrl.kernels.head.backend import BackendName, SinglePassBackend
from xrl.kernels.head.grpo_loss import GrpoLossOutput, grpo_token_loss, reference_grpo_token_loss
from xrl.kernels.head.logprob import reference_logprob

BACKENDS: tuple[BackendName, ...] = ("reference", "native")
R, V = 64, 997

SETTINGS = {
    "plain": TokenLossSettings(),
    "clip apart, dual clip": TokenLossSettings(clip_low=0.2, clip_high=0.28, dual_clip=3.0),
    "k1": TokenLossSettings(kl_coef=0.1, kl_type="k1"),
    "k2": TokenLossSettings(kl_coef=0.1, kl_type="k2"),
    "k3": TokenLossSettings(kl_coef=0.1, kl_type="k3"),
    "entropy": TokenLossSettings(entropy_coef=0.05),
    "truncate": TokenLossSettings(importance_correction="truncate", importance_bound=1.5),
    "mask": TokenLossSettings(importance_correction="mask", importance_bound=1.5),
    "everything": TokenLossSettings(
        clip_low=0.1, dual_clip=2.0, kl_coef=0.2, entropy_coef=0.01, importance_correction="mask", importance_bound=2.0
    ),
}


def make_inputs(*, temperature: float = 0.7, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Old log-probs that put ratios on both sides of every bound, far out ones and exact ties among them."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(R, V, generator=generator).to(dtype)
    ids = torch.randint(0, V, (R,), generator=generator)
    logprob = reference_logprob(logits.double(), ids, temperature=temperature).logprob.float()
    spread = torch.randn(R, generator=generator) * 0.4
    spread[:6] = torch.tensor([0.0, 50.0, -50.0, 5.0, -5.0, 0.0])
    advantages = torch.randn(R, generator=generator)
    advantages[5:8] = 0.0
    shares = torch.rand(R, generator=generator)
    shares[10:20] = 0.0
    return {
        "logits": logits,
        "token_ids": ids,
        "advantages": advantages,
        "shares": shares,
        "old_logprobs": logprob - spread,
        "rollout_logprobs": logprob - spread + 0.3 * torch.randn(R, generator=generator),
        "reference_logprobs": logprob - 0.5 * torch.randn(R, generator=generator),
        "temperature": temperature,
    }


def run(inputs: dict[str, Any], settings: TokenLossSettings, **options: Any) -> tuple[GrpoLossOutput, Tensor]:
    logits = inputs["logits"].clone().requires_grad_()
    # Not a leaf: what comes out of a model isn't one, and may be overwritten.
    out = _call(logits * 1.0, inputs, settings, options)
    out.token_loss.sum().backward()
    assert logits.grad is not None
    return out, logits.grad


def _call(
    logits: Tensor, inputs: dict[str, Any], settings: TokenLossSettings, options: dict[str, Any]
) -> GrpoLossOutput:
    rest = {name: value for name, value in inputs.items() if name != "logits"}
    return call_loss(grpo_token_loss, logits=logits, settings=settings, **rest, **options)


def expected(inputs: dict[str, Any], settings: TokenLossSettings) -> tuple[Tensor, Tensor]:
    exact = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    exact["logits"].requires_grad_()
    loss = call_loss(reference_grpo_token_loss, **exact, settings=settings)
    loss.sum().backward()
    return loss.detach(), exact["logits"].grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SETTINGS)
def test_loss_and_gradient_are_those_of_the_algorithm(name: str, backend: BackendName, dtype: torch.dtype) -> None:
    inputs = make_inputs(dtype=dtype)
    out, gradient = run(inputs, SETTINGS[name], backend=backend)
    loss, wanted = expected(inputs, SETTINGS[name])
    torch.testing.assert_close(out.token_loss.detach().double(), loss, rtol=1e-4, atol=1e-6)
    error = (gradient.double() - wanted).abs().amax(1)
    tolerance = 2e-5 if dtype == torch.float32 else 6e-3
    assert (error <= tolerance * wanted.abs().amax(1) + 1e-9).all()


@pytest.mark.parametrize("name", SETTINGS)
def test_backends_agree_on_every_output(name: str) -> None:
    inputs = make_inputs()
    ours, plain = (run(inputs, SETTINGS[name], backend=backend)[0] for backend in ("native", "reference"))
    for field in ("token_loss", "logprob", "entropy", "ratio", "kl", "importance"):
        torch.testing.assert_close(getattr(ours, field), getattr(plain, field), rtol=2e-5, atol=2e-6, msg=field)
    for field in ("clipped_low", "clipped_high", "clipped_dual", "importance_bounded"):
        assert torch.equal(getattr(ours, field), getattr(plain, field)), field


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_old_logprobs_the_ratio_is_one(backend: BackendName) -> None:
    inputs = make_inputs() | {"old_logprobs": None, "rollout_logprobs": None}
    out, _ = run(inputs, TokenLossSettings(), backend=backend)
    unmasked = inputs["shares"] != 0
    assert (out.ratio[unmasked] == 1).all() and (out.importance[unmasked] == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_rows_may_hold_anything_and_give_zeros(backend: BackendName) -> None:
    inputs = make_inputs()
    masked = inputs["shares"] == 0
    clean, clean_gradient = run(inputs, SETTINGS["everything"], backend=backend)
    spoilt = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    spoilt["logits"][masked] = torch.nan
    spoilt["token_ids"][masked] = -100
    for name in ("advantages", "old_logprobs", "rollout_logprobs", "reference_logprobs"):
        spoilt[name][masked] = torch.inf
    out, gradient = run(spoilt, SETTINGS["everything"], backend=backend)
    assert torch.equal(out.token_loss, clean.token_loss) and torch.equal(gradient, clean_gradient)
    assert (gradient[masked] == 0).all() and (out.logprob[masked] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_in_place_is_the_gradient_and_takes_the_logits_memory(backend: BackendName) -> None:
    inputs, settings = make_inputs(), SETTINGS["everything"]
    _, apart = run(inputs, settings, backend=backend, in_place=False)
    logits = inputs["logits"].clone().requires_grad_()
    hidden = logits * 1.0
    before = hidden.detach().clone()
    out = _call(hidden, inputs, settings, {"backend": backend})
    assert torch.equal(hidden, apart) and not torch.equal(hidden, before)
    out.token_loss.sum().backward()
    assert torch.equal(logits.grad, apart)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_that_arrives_multiplies_rows(backend: BackendName) -> None:
    inputs, settings = make_inputs(), SETTINGS["plain"]
    _, once = run(inputs, settings, backend=backend)
    logits = inputs["logits"].clone().requires_grad_()
    factors = torch.linspace(-1, 2, R)
    _call(logits * 1.0, inputs, settings, {"backend": backend}).token_loss.backward(factors)
    torch.testing.assert_close(logits.grad, once * factors[:, None])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_in_fp64_give_what_they_give_in_fp32(backend: BackendName) -> None:
    inputs, settings = make_inputs(), SETTINGS["everything"]
    names = ("advantages", "shares", "old_logprobs", "rollout_logprobs", "reference_logprobs")
    out, gradient = run(inputs, settings, backend=backend)
    wide, wide_gradient = run(inputs | {name: inputs[name].double() for name in names}, settings, backend=backend)
    torch.testing.assert_close(wide.token_loss.float(), out.token_loss, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(wide_gradient, gradient, rtol=1e-4, atol=1e-7)


def test_without_a_gradient_the_logits_stay_as_they_are() -> None:
    inputs = make_inputs()
    before = inputs["logits"].clone()
    _call(inputs["logits"], inputs, SETTINGS["everything"], {})
    assert torch.equal(inputs["logits"], before)


def test_second_backward_pass_is_refused() -> None:
    inputs = make_inputs()
    out = _call(inputs["logits"].clone().requires_grad_() * 1.0, inputs, TokenLossSettings(), {})
    out.token_loss.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be taken once"):
        out.token_loss.sum().backward()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"advantages": torch.zeros(3)}, r"advantages must be fp32 \[R\] = \[64\], got torch.float32"),
        ({"old_logprobs": torch.zeros(R, dtype=torch.int64)}, "old_logprobs must be fp32"),
        ({"rollout_logprobs": torch.zeros(R, 1)}, r"rollout_logprobs must be fp32 .* got torch.float32 \[64, 1\]"),
        ({"shares": torch.zeros(R, device="meta")}, "shares are on meta, not on cpu"),
        ({"token_ids": torch.full((R,), V)}, "which no shard holds"),
        ({"reference_logprobs": None}, "needs reference_logprobs, got None"),
        ({"rollout_logprobs": None}, "needs rollout_logprobs, got None"),
        ({"temperature": -1.0}, "temperature must be finite and > 0"),
    ],
)
def test_bad_input_is_named(changes: dict[str, Any], message: str) -> None:
    inputs = make_inputs() | changes
    with pytest.raises(ValueError, match=message):
        _call(inputs["logits"], inputs, SETTINGS["everything"], {})


def test_without_a_gradient_the_logits_stay() -> None:
    inputs = make_inputs()
    logits = inputs["logits"].clone().requires_grad_()
    with torch.no_grad():
        _call(logits, inputs, SETTINGS["plain"], {})
    assert torch.equal(logits, inputs["logits"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_that_was_told_in_advance_is_in_it_already(backend: BackendName) -> None:
    inputs, settings = make_inputs(), SETTINGS["everything"]
    _, once = run(inputs, settings, backend=backend)
    logits = inputs["logits"].clone().requires_grad_()
    options = {"backend": backend, "upstream": 4.0}
    _call(logits * 1.0, inputs, settings, options).token_loss.backward(torch.full((R,), 4.0))
    torch.testing.assert_close(logits.grad, 4 * once)
    out = _call(logits * 1.0, inputs, settings, options)
    with pytest.raises(RuntimeError, match="expected upstream gradient 4, got another"):
        out.token_loss.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SETTINGS)
def test_single_pass_over_rows_equals_two(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(dtype=dtype)
    assert isinstance(native_cpu, SinglePassBackend)
    once, gradient = run(inputs, SETTINGS[name], backend="native")
    # Not what any backend is: ranks that share the vocabulary take two passes.
    monkeypatch.setattr(grpo_loss, "SinglePassBackend", int)
    twice, wanted = run(inputs, SETTINGS[name], backend="native")
    for field in ("token_loss", "logprob", "entropy", "ratio", "kl", "importance"):
        torch.testing.assert_close(getattr(once, field), getattr(twice, field), rtol=2e-6, atol=1e-6, msg=field)
    for field in ("clipped_low", "clipped_high", "clipped_dual", "importance_bounded"):
        assert torch.equal(getattr(once, field), getattr(twice, field)), field
    difference = (gradient.float() - wanted.float()).abs().amax(1)
    tolerance = 5e-6 if dtype == torch.float32 else 4e-3
    assert (difference <= tolerance * wanted.float().abs().amax(1)).all()


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("upstream", [None, 0.3])
def test_compiled_graph_has_no_break_and_gives_the_same(
    upstream: float | None, dtype: torch.dtype, backend: BackendName
) -> None:
    inputs, settings = make_inputs(dtype=dtype), SETTINGS["everything"]

    def loss(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = _call(x * 1.0, inputs, settings, {"upstream": upstream, "backend": backend})
        return 0.3 * out.token_loss.sum(), out.ratio, out.clipped_low

    torch.compiler.reset()  # how often one function is compiled is limited
    results = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = inputs["logits"].clone().requires_grad_()
        outputs = call(leaf)
        outputs[0].backward()
        results.append((*(each.detach() for each in outputs), leaf.grad))
    assert all(torch.equal(compiled, plain) for compiled, plain in zip(*results, strict=True))


@pytest.mark.slow
def test_compiled_graph_notices_another_gradient_than_it_was_told_of() -> None:
    inputs = make_inputs()

    def loss(x: Tensor) -> Tensor:
        return _call(x * 1.0, inputs, SETTINGS["plain"], {"upstream": 4.0}).token_loss.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="expected upstream gradient 4, got another"):
        compiled(inputs["logits"].clone().requires_grad_()).backward()
