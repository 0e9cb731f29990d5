"""Checks of the Triton kernel of the GRPO loss that `test_triton_interpreter.py` runs with TRITON_INTERPRET=1.

Each compares with `xrl.algorithms`.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from xrl.algorithms.clipped import clipped_surrogate
from xrl.algorithms.importance import importance_weights
from xrl.algorithms.kl import KL_ESTIMATORS
from xrl.kernels.triton.backend import grpo_rows

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_triton_interpreter.py"

INF = math.inf
OUTPUTS = ["token_loss", "grad_logprob", "grad_entropy", "ratio", "kl", "importance", "low", "high", "dual", "bounded"]


@dataclass(frozen=True, kw_only=True)
class Params:
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 0.0
    kl_type: int = 0
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    importance: int = 0
    importance_bound: float = 2.0
    importance_from_current: bool = False


def random_rows(num_rows: int, *, seed: int = 0, spread: float = 0.5) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float = 1.0) -> Tensor:
        return torch.randn(num_rows, generator=generator) * scale

    logprob = -normal().abs() - 0.1
    return {
        "logprob": logprob,
        "entropy": normal().abs(),
        "old": logprob + normal(spread),
        "rollout": logprob + normal(spread),
        "reference": logprob + normal(spread),
        "advantages": normal() * (torch.arange(num_rows) % 7 != 0),
        "weights": torch.rand(num_rows, generator=generator) * (torch.arange(num_rows) % 5 != 0),
    }


def expected_rows(rows: dict[str, Tensor | None], params: Params, dtype: torch.dtype) -> Tensor:
    """[10, R] by `xrl.algorithms` and autograd."""
    rows = {name: None if row is None else row.to(dtype) for name, row in rows.items()}
    logprob, entropy = rows["logprob"].requires_grad_(), rows["entropy"].requires_grad_()
    old = logprob.detach() if rows["old"] is None else rows["old"]
    surrogate = clipped_surrogate(
        logprob,
        old,
        rows["advantages"],
        clip_low=params.clip_low,
        clip_high=params.clip_high,
        dual_clip=params.dual_clip or None,
    )
    numerator = logprob if params.importance_from_current else old
    importance = importance_weights(
        numerator,
        numerator if rows["rollout"] is None else rows["rollout"],
        kind=("off", "truncate", "mask")[params.importance],
        bound=params.importance_bound,
    )
    loss = importance.weights * surrogate.loss
    kl = torch.zeros_like(logprob)
    if params.kl_type and rows["reference"] is not None:
        kl = KL_ESTIMATORS[("k1", "k2", "k3")[params.kl_type - 1]](logprob, rows["reference"])
        if params.kl_coef:
            loss = loss + params.kl_coef * kl
    if params.entropy_coef:
        loss = loss - params.entropy_coef * entropy
    by_logprob, by_entropy = torch.autograd.grad(
        loss.sum(), (logprob, entropy), allow_unused=True, materialize_grads=True
    )
    weighted = [(rows["weights"] * row).masked_fill(rows["weights"] == 0, 0) for row in (loss, by_logprob, by_entropy)]
    flags = [surrogate.clipped_low, surrogate.clipped_high, surrogate.clipped_dual, importance.bounded]
    return torch.stack([*weighted, surrogate.ratio, kl, importance.raw, *(flag.to(dtype) for flag in flags)]).detach()


def check_rows(rows: dict[str, Tensor | None], params: Params) -> Tensor:
    found = grpo_rows(**rows, params=params)
    # Differences of log-probs round in fp32, and which side of a bound a token falls on hangs on that: both are taken
    # in fp32, except that fp64 keeps the digits of k3 near 0.
    expected = expected_rows(rows, params, torch.float32)
    for name, have, want in zip(OUTPUTS, found, expected, strict=True):
        slack = 1e-6 if name in ("token_loss", "grad_logprob", "kl") else 0.0
        torch.testing.assert_close(
            have, want, rtol=1e-5, atol=slack, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )
    return found


@pytest.mark.parametrize("dual_clip", [0.0, 3.0])
@pytest.mark.parametrize("kl_type", [0, 1, 2, 3])
@pytest.mark.parametrize(("importance", "from_current"), [(0, False), (1, False), (1, True), (2, False), (2, True)])
def test_rows_equal_the_algorithms(dual_clip: float, kl_type: int, importance: int, from_current: bool) -> None:
    for entropy_coef, kl_coef in ((0.0, 0.0), (0.01, 0.05)):
        params = Params(
            dual_clip=dual_clip,
            kl_type=kl_type,
            kl_coef=kl_coef,
            entropy_coef=entropy_coef,
            importance=importance,
            importance_bound=1.5,
            importance_from_current=from_current,
        )
        found = check_rows(random_rows(300, seed=kl_type), params)
        assert found[6].any() and found[7].any()
        assert found[9].any() == (importance > 0)
        check_rows(random_rows(300, seed=kl_type, spread=3.0), params)


@pytest.mark.parametrize("absent", ["old", "rollout", "reference"])
def test_what_may_be_absent(absent: str) -> None:
    params = Params(kl_type=3, kl_coef=0.1, importance=1, importance_bound=1.2, dual_clip=2.0)
    found = check_rows({**random_rows(100), absent: None}, params)
    constant = {"old": (3, 1.0), "rollout": (5, 1.0), "reference": (4, 0.0)}[absent]
    assert bool((found[constant[0]] == constant[1]).all())
    check_rows({**random_rows(100), "old": None, "rollout": None, "reference": None}, params)


@pytest.mark.parametrize("log_ratio", [0.2, -0.2, 0.1, -0.1, 0.0])
def test_a_ratio_on_a_bound_is_not_clipped_and_one_beyond_it_is(log_ratio: float) -> None:
    rows = random_rows(3)
    rows["old"], rows["logprob"] = torch.zeros(3), torch.full((3,), log_ratio)
    rows["advantages"], rows["weights"] = torch.tensor([1.0, -1.0, 0.0]), torch.ones(3)
    # The ratio as the kernel has it: exp of the interpreter and of torch differ in the last place.
    ratio = grpo_rows(**rows, params=Params())[3, 0]
    edge = abs(ratio.item() - 1.0)
    upwards = log_ratio > 0

    on_bound = grpo_rows(**rows, params=Params(clip_low=edge, clip_high=edge))
    assert not on_bound[6:].any()
    torch.testing.assert_close(on_bound[1], -rows["advantages"] * ratio, rtol=1e-6, atol=0)
    if log_ratio:
        beyond = grpo_rows(**rows, params=_bounds(ratio))
        assert beyond[6].tolist() == [0.0, 0.0 if upwards else 1.0, 0.0]
        assert beyond[7].tolist() == [1.0 if upwards else 0.0, 0.0, 0.0]
        assert (beyond[1] == 0).tolist() == [upwards, not upwards, True]


def _bounds(ratio: Tensor) -> Params:
    """The widest bounds that a ratio is outside of."""
    nearer = abs(ratio.nextafter(torch.ones(())).item() - 1.0)
    return Params(clip_low=nearer, clip_high=nearer)


@pytest.mark.parametrize("clip", [0.2, 0.28, 0.1, 0.003, 0.0])
def test_bounds_that_fp32_cannot_hold_are_those_of_pytorch(clip: float) -> None:
    bounds = torch.tensor([1.0 + clip, 1.0 - clip])
    around = torch.cat([bounds, bounds.nextafter(bounds + 1), bounds.nextafter(bounds - 1)]).log()
    rows = {**random_rows(12), "old": torch.zeros(12), "rollout": torch.zeros(12), "logprob": torch.cat([around] * 2)}
    rows["advantages"] = torch.tensor([1.0, -1.0]).repeat_interleave(6)
    params = Params(
        clip_low=clip, clip_high=clip, importance=2, importance_bound=1.0 + clip, importance_from_current=True
    )
    found, expected = grpo_rows(**rows, params=params), expected_rows(rows, params, torch.float32)
    same = found[3] == expected[3]  # exp of the interpreter and of torch differ in the last place
    assert same.any()
    torch.testing.assert_close(found[:, same], expected[:, same], rtol=1e-6, atol=0)


def test_ratios_that_overflow() -> None:
    rows = random_rows(60, spread=0.0)
    jumps = torch.tensor([50.0, -50.0, 20.0, -20.0, 19.5, 100.0])
    for name in ("old", "rollout", "reference"):
        rows[name] = rows["logprob"] - jumps.repeat(10)
    for kl_type in (1, 2, 3):
        for dual_clip in (0.0, 3.0):
            params = Params(kl_type=kl_type, kl_coef=0.1, dual_clip=dual_clip, importance=1, importance_bound=5.0)
            assert check_rows(rows, params).isfinite().all()


def test_k3_keeps_its_digits_near_0() -> None:
    rows = random_rows(64)
    rows["logprob"] = torch.zeros(64)
    rows["reference"] = torch.logspace(-6, 1.2, 64) * (1 - 2 * (torch.arange(64) % 2))
    params = Params(kl_type=3, kl_coef=1.0)
    found = grpo_rows(**rows, params=params)
    expected = expected_rows(rows, params, torch.float64)
    torch.testing.assert_close(found[4].double(), expected[4], rtol=2e-6, atol=0)


@pytest.mark.parametrize("poison", [math.nan, INF, -INF])
def test_masked_rows_are_0_whatever_they_hold(poison: float) -> None:
    rows = random_rows(100)
    masked = rows["weights"] == 0
    assert masked.any()
    for name in ("logprob", "entropy", "old", "rollout", "reference", "advantages"):
        rows[name][masked] = poison
    params = Params(kl_type=3, kl_coef=0.1, entropy_coef=0.1, importance=2, dual_clip=3.0)
    found = grpo_rows(**rows, params=params)
    assert torch.equal(found[:3, masked], torch.zeros_like(found[:3, masked]))
    expected = expected_rows(rows, params, torch.float32)
    torch.testing.assert_close(found[:, ~masked], expected[:, ~masked], rtol=1e-5, atol=1e-6)


def test_terms_that_are_off_bring_in_no_nan() -> None:
    rows = random_rows(20)
    rows["entropy"][:] = math.nan
    rows["reference"][:] = math.nan
    assert grpo_rows(**rows, params=Params(kl_type=3))[:3].isfinite().all()


def test_nan_in_a_live_row_reaches_its_loss() -> None:
    rows = random_rows(20)
    rows["weights"][:] = 1.0
    rows["logprob"][3] = math.nan
    assert grpo_rows(**rows, params=Params())[0].isnan().nonzero().tolist() == [[3]]


def test_no_tokens() -> None:
    assert grpo_rows(**random_rows(0), params=Params()).shape == (10, 0)
