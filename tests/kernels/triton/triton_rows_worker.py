"""Checks of the Triton kernel of the GRPO loss that `test_triton_interpreter.py` runs with TRITON_INTERPRET=1.

Each compares with `xrl.algorithms`.
"""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from xrl.algorithms.clipped import clipped_surrogate
from xrl.algorithms.importance import token_importance
from xrl.algorithms.kl import KL_ESTIMATORS
from xrl.algorithms.loss_settings import TokenLossSettings
from xrl.kernels.head.grpo_rows import ROW_OUTPUTS
from xrl.kernels.head.token_inputs import TokenInputs
from xrl.kernels.triton.backend import grpo_rows

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_triton_interpreter.py"

INF = math.inf
OUTPUTS = ["token_loss", "grad_logprob", "grad_entropy", "ratio", "kl", "importance", "low", "high", "dual", "bounded"]


def settings_of(**changes: Any) -> TokenLossSettings:
    return TokenLossSettings(**({"clip_high": 0.28} | changes))


def run(rows: dict[str, Tensor | None], settings: TokenLossSettings) -> Tensor:
    """`grpo_rows` of rows by name."""
    tokens = {name: row for name, row in rows.items() if name not in ("logprob", "entropy")}
    return grpo_rows(rows["logprob"], rows["entropy"], tokens=TokenInputs(**tokens), settings=settings)


def random_rows(num_rows: int, *, seed: int = 0, spread: float = 0.5) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float = 1.0) -> Tensor:
        return torch.randn(num_rows, generator=generator) * scale

    logprob = -normal().abs() - 0.1
    return {
        "logprob": logprob,
        "entropy": normal().abs(),
        "old_logprobs": logprob + normal(spread),
        "rollout_logprobs": logprob + normal(spread),
        "reference_logprobs": logprob + normal(spread),
        "advantages": normal() * (torch.arange(num_rows) % 7 != 0),
        "shares": torch.rand(num_rows, generator=generator) * (torch.arange(num_rows) % 5 != 0),
    }


def expected_rows(rows: dict[str, Tensor | None], settings: TokenLossSettings, dtype: torch.dtype) -> Tensor:
    """[ROW_OUTPUTS, R] by `xrl.algorithms` and autograd."""
    rows = {name: None if row is None else row.to(dtype) for name, row in rows.items()}
    logprob, entropy = rows["logprob"].requires_grad_(), rows["entropy"].requires_grad_()
    old = logprob.detach() if rows["old_logprobs"] is None else rows["old_logprobs"]
    surrogate = clipped_surrogate(
        logprob,
        old,
        rows["advantages"],
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        dual_clip=settings.dual_clip,
    )
    numerator = logprob if settings.importance_from_current else old
    importance = token_importance(
        numerator,
        numerator if rows["rollout_logprobs"] is None else rows["rollout_logprobs"],
        kind=settings.importance_correction,
        bound=settings.importance_bound,
    )
    loss = importance.factor * surrogate.loss
    kl = torch.zeros_like(logprob)
    if rows["reference_logprobs"] is not None:
        kl = KL_ESTIMATORS[settings.kl_type](logprob, rows["reference_logprobs"])
        if settings.kl_coef:
            loss = loss + settings.kl_coef * kl
    if settings.entropy_coef:
        loss = loss - settings.entropy_coef * entropy
    by_logprob, by_entropy = torch.autograd.grad(
        loss.sum(), (logprob, entropy), allow_unused=True, materialize_grads=True
    )
    weighted = [(rows["shares"] * row).masked_fill(rows["shares"] == 0, 0) for row in (loss, by_logprob, by_entropy)]
    flags = [surrogate.clipped_low, surrogate.clipped_high, surrogate.clipped_dual, importance.bounded]
    return torch.stack([*weighted, surrogate.ratio, kl, importance.raw, *(flag.to(dtype) for flag in flags)]).detach()


def check_rows(rows: dict[str, Tensor | None], settings: TokenLossSettings) -> Tensor:
    found = run(rows, settings)
    # Differences of log-probs round in fp32, and which side of a bound a token falls on hangs on that: both are taken
    # in fp32, except that fp64 keeps the digits of k3 near 0.
    expected = expected_rows(rows, settings, torch.float32)
    for name, have, want in zip(OUTPUTS, found, expected, strict=True):
        slack = 1e-6 if name in ("token_loss", "grad_logprob", "kl") else 0.0
        torch.testing.assert_close(
            have, want, rtol=1e-5, atol=slack, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )
    return found


@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("kl_type", [None, "k1", "k2", "k3"])
@pytest.mark.parametrize(
    ("importance", "from_current"),
    [("off", False), ("truncate", False), ("truncate", True), ("mask", False), ("mask", True)],
)
def test_rows_equal_the_algorithms(
    dual_clip: float | None, kl_type: str | None, importance: str, from_current: bool
) -> None:
    seed = int(kl_type[1]) if kl_type else 0
    without = {} if kl_type else {"reference_logprobs": None}
    for entropy_coef, kl_coef in ((0.0, 0.0), (0.01, 0.05)):
        settings = settings_of(
            dual_clip=dual_clip,
            kl_type=kl_type or "k3",
            kl_coef=kl_coef if kl_type else 0.0,
            entropy_coef=entropy_coef,
            importance_correction=importance,
            importance_bound=1.5,
            importance_from_current=from_current,
        )
        found = check_rows(random_rows(300, seed=seed) | without, settings)
        assert found[6].any() and found[7].any()
        assert found[9].any() == (importance != "off")
        check_rows(random_rows(300, seed=seed, spread=3.0) | without, settings)


@pytest.mark.parametrize("absent", ["old_logprobs", "rollout_logprobs", "reference_logprobs"])
def test_what_may_be_absent(absent: str) -> None:
    settings = settings_of(
        # Without a reference there is no KL, which whoever calls the primitive must have seen to.
        kl_coef=0.0 if absent == "reference_logprobs" else 0.1,
        importance_correction="truncate",
        importance_bound=1.2,
        dual_clip=2.0,
    )
    found = check_rows({**random_rows(100), absent: None}, settings)
    constant = {"old_logprobs": (3, 1.0), "rollout_logprobs": (5, 1.0), "reference_logprobs": (4, 0.0)}[absent]
    assert bool((found[constant[0]] == constant[1]).all())
    check_rows(
        {**random_rows(100), "old_logprobs": None, "rollout_logprobs": None, "reference_logprobs": None}, settings
    )


@pytest.mark.parametrize("log_ratio", [0.2, -0.2, 0.1, -0.1, 0.0])
def test_a_ratio_on_a_bound_is_not_clipped_and_one_beyond_it_is(log_ratio: float) -> None:
    rows = random_rows(3)
    rows["old_logprobs"], rows["logprob"] = torch.zeros(3), torch.full((3,), log_ratio)
    rows["advantages"], rows["shares"] = torch.tensor([1.0, -1.0, 0.0]), torch.ones(3)
    # The ratio as the kernel has it: exp of the interpreter and of torch differ in the last place.
    ratio = run(rows, settings_of())[3, 0]
    edge = abs(ratio.item() - 1.0)
    upwards = log_ratio > 0

    on_bound = run(rows, settings_of(clip_low=edge, clip_high=edge))
    assert not on_bound[6:].any()
    torch.testing.assert_close(on_bound[1], -rows["advantages"] * ratio, rtol=1e-6, atol=0)
    if log_ratio:
        beyond = run(rows, _bounds(ratio))
        assert beyond[6].tolist() == [0.0, 0.0 if upwards else 1.0, 0.0]
        assert beyond[7].tolist() == [1.0 if upwards else 0.0, 0.0, 0.0]
        assert (beyond[1] == 0).tolist() == [upwards, not upwards, True]


def _bounds(ratio: Tensor) -> TokenLossSettings:
    """The widest bounds that a ratio is outside of."""
    nearer = abs(ratio.nextafter(torch.ones(())).item() - 1.0)
    return settings_of(clip_low=nearer, clip_high=nearer)


@pytest.mark.parametrize("clip", [0.2, 0.28, 0.1, 0.003, 0.0])
def test_bounds_that_fp32_cannot_hold_are_those_of_pytorch(clip: float) -> None:
    bounds = torch.tensor([1.0 + clip, 1.0 - clip])
    around = torch.cat([bounds, bounds.nextafter(bounds + 1), bounds.nextafter(bounds - 1)]).log()
    rows = {**random_rows(12), "logprob": torch.cat([around] * 2)}
    rows |= {"old_logprobs": torch.zeros(12), "rollout_logprobs": torch.zeros(12), "reference_logprobs": None}
    rows["advantages"] = torch.tensor([1.0, -1.0]).repeat_interleave(6)
    settings = settings_of(
        clip_low=clip,
        clip_high=clip,
        importance_correction="mask",
        importance_bound=1.0 + max(clip, 1e-9),  # 1 in fp32, where clip is 0
        importance_from_current=True,
    )
    found, expected = run(rows, settings), expected_rows(rows, settings, torch.float32)
    same = found[3] == expected[3]  # exp of the interpreter and of torch differ in the last place
    assert same.any()
    torch.testing.assert_close(found[:, same], expected[:, same], rtol=1e-6, atol=0)


def test_ratios_that_overflow() -> None:
    rows = random_rows(60, spread=0.0)
    jumps = torch.tensor([50.0, -50.0, 20.0, -20.0, 19.5, 100.0])
    for name in ("old_logprobs", "rollout_logprobs", "reference_logprobs"):
        rows[name] = rows["logprob"] - jumps.repeat(10)
    for kl_type in ("k1", "k2", "k3"):
        for dual_clip in (None, 3.0):
            settings = settings_of(
                kl_type=kl_type,
                kl_coef=0.1,
                dual_clip=dual_clip,
                importance_correction="truncate",
                importance_bound=5.0,
            )
            assert check_rows(rows, settings).isfinite().all()


def test_k3_keeps_its_digits_near_0() -> None:
    rows = random_rows(64)
    rows["logprob"] = torch.zeros(64)
    rows["reference_logprobs"] = torch.logspace(-6, 1.2, 64) * (1 - 2 * (torch.arange(64) % 2))
    settings = settings_of(kl_coef=1.0)
    found = run(rows, settings)
    expected = expected_rows(rows, settings, torch.float64)
    torch.testing.assert_close(found[4].double(), expected[4], rtol=2e-6, atol=0)


@pytest.mark.parametrize("poison", [math.nan, INF, -INF])
def test_masked_rows_are_0_whatever_they_hold(poison: float) -> None:
    rows = random_rows(100)
    masked = rows["shares"] == 0
    assert masked.any()
    for name in ("logprob", "entropy", "old_logprobs", "rollout_logprobs", "reference_logprobs", "advantages"):
        rows[name][masked] = poison
    settings = settings_of(kl_coef=0.1, entropy_coef=0.1, importance_correction="mask", dual_clip=3.0)
    found = run(rows, settings)
    assert torch.equal(found[:3, masked], torch.zeros_like(found[:3, masked]))
    expected = expected_rows(rows, settings, torch.float32)
    torch.testing.assert_close(found[:, ~masked], expected[:, ~masked], rtol=1e-5, atol=1e-6)


def test_terms_that_are_off_bring_in_no_nan() -> None:
    rows = random_rows(20)
    rows["entropy"][:] = math.nan
    rows["reference_logprobs"][:] = math.nan
    assert run(rows, settings_of())[:3].isfinite().all()


def test_nan_in_a_live_row_reaches_its_loss() -> None:
    rows = random_rows(20)
    rows["shares"][:] = 1.0
    rows["logprob"][3] = math.nan
    assert run(rows, settings_of())[0].isnan().nonzero().tolist() == [[3]]


def test_no_tokens() -> None:
    assert run(random_rows(0), settings_of()).shape == (len(ROW_OUTPUTS), 0)
