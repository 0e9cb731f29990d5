"""Checks of the Triton log-prob kernels that `test_triton_interpreter.py` runs with TRITON_INTERPRET=1.

Each compares with the formulas of the docstrings in fp64, on outputs that held NaN before.
"""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from xrl.kernels.shards import ShardColumns, Softmax
from xrl.kernels.triton.backend import gradient, statistics

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_triton_interpreter.py"

INF = math.inf
DTYPES = [torch.float32, torch.bfloat16]
# So few that rows of a few hundred columns take several steps.
SMALL_STEP = 64


@dataclass(kw_only=True)
class Case:
    logits: Tensor  # [R, V]
    token_ids: Tensor  # [R]
    temperature: float = 1.0
    vocab_start: int = 0
    num_columns: int | None = None
    groups_per_step: int = SMALL_STEP

    @property
    def columns(self) -> ShardColumns:
        return ShardColumns(
            group=None,
            vocab_start=self.vocab_start,
            num_columns=self.logits.shape[1] if self.num_columns is None else self.num_columns,
            inverse_temperature=1.0 / self.temperature,
        )


def random_case(
    num_rows: int,
    width: int,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    spread: float = 3.0,
    shift: float = 0.0,
    stride: int | None = None,
    offset: int = 0,
    **more,
) -> Case:
    """Logits whose base lies `offset` elements behind a multiple of 16 bytes, in rows `stride` apart, NaN between."""
    generator = torch.Generator().manual_seed(seed)
    stride = width if stride is None else stride
    storage = torch.full((offset + num_rows * stride + 16,), math.nan, dtype=dtype)
    logits = storage[offset:].as_strided((num_rows, width), (stride, 1))
    assert logits.data_ptr() % 16 == offset * logits.element_size() % 16
    logits.copy_(torch.randn(num_rows, width, generator=generator) * spread + shift)
    columns = more.get("num_columns", width)
    token_ids = torch.randint(max(columns, 1), (num_rows,), generator=generator) + more.get("vocab_start", 0)
    if num_rows > 1 and columns:
        token_ids[0], token_ids[-1] = more.get("vocab_start", 0), more.get("vocab_start", 0) + columns - 1
    return Case(logits=logits, token_ids=token_ids, **more)


def expected_statistics(case: Case) -> Tensor:
    scale, start, columns = case.columns.inverse_temperature, case.vocab_start, case.columns.num_columns
    x = case.logits[:, :columns].double()
    result = torch.zeros(4, x.shape[0], dtype=torch.float64)
    for row, token in enumerate(case.token_ids.tolist()):
        maximum = x[row].max() if columns else torch.tensor(-INF)
        owned = start <= token < start + columns
        result[0, row] = maximum
        if maximum == -INF:
            result[3, row] = -INF if owned else 0.0
            continue
        s = (x[row] - maximum) * scale
        result[1, row] = s.exp().sum()
        result[2, row] = (s.exp() * s.clamp(min=-1e6)).sum()
        if owned:
            result[3, row] = s[token - start]
    return result


def run_statistics(case: Case) -> Tensor:
    return statistics(case.logits, case.token_ids, case.columns, groups_per_step=case.groups_per_step)


def check_statistics(case: Case) -> Tensor:
    found, expected = run_statistics(case), expected_statistics(case)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    torch.testing.assert_close(found[0].double(), expected[0], rtol=0, atol=0)
    torch.testing.assert_close(found[1].double(), expected[1], rtol=2e-6, atol=0)
    torch.testing.assert_close(found[2].double(), expected[2], rtol=4e-6, atol=1e-6)
    torch.testing.assert_close(found[3].double(), expected[3], rtol=3e-7, atol=0)
    return found


@dataclass(kw_only=True)
class Slopes:
    """What `gradient` takes beside logits, all [R] fp32."""

    maximum: Tensor
    log_sum: Tensor
    entropy: Tensor
    grad_logprob: Tensor
    grad_entropy: Tensor | None


def slopes_of(case: Case, *, entropy: bool, seed: int = 1) -> Slopes:
    generator = torch.Generator().manual_seed(seed)
    maximum, sum_exp, sum_exp_shifted, _ = expected_statistics(case)
    log_sum = sum_exp.log()
    num_rows = len(maximum)
    return Slopes(
        maximum=maximum.float(),
        log_sum=log_sum.float(),
        entropy=(log_sum - sum_exp_shifted / sum_exp).float(),
        grad_logprob=torch.randn(num_rows, generator=generator),
        grad_entropy=torch.randn(num_rows, generator=generator) if entropy else None,
    )


def expected_gradient(case: Case, slopes: Slopes) -> Tensor:
    scale, start, columns = case.columns.inverse_temperature, case.vocab_start, case.columns.num_columns
    result = torch.zeros(case.logits.shape, dtype=torch.float64)
    for row, token in enumerate(case.token_ids.tolist()):
        by_logprob = slopes.grad_logprob[row].double()
        by_entropy = torch.zeros(()) if slopes.grad_entropy is None else slopes.grad_entropy[row].double()
        if by_logprob == 0 and by_entropy == 0:
            continue
        x = case.logits[row, :columns].double()
        logp = ((x - slopes.maximum[row].double()) * scale - slopes.log_sum[row].double()).clamp(max=0.0)
        p = logp.exp()
        result[row, :columns] = -by_logprob * p - by_entropy * p * (logp.clamp(min=-1e6) + slopes.entropy[row].double())
        if start <= token < start + columns:
            result[row, token - start] += by_logprob
    return result * scale


def run_gradient(case: Case, slopes: Slopes, out: Tensor) -> Tensor:
    gradient(
        case.logits,
        case.token_ids,
        out,
        columns=case.columns,
        softmax=Softmax(maximum=slopes.maximum, log_sum=slopes.log_sum, entropy=slopes.entropy),
        grad_logprob=slopes.grad_logprob,
        grad_entropy=slopes.grad_entropy,
        groups_per_step=case.groups_per_step,
    )
    return out


def check_gradient(case: Case, slopes: Slopes) -> Tensor:
    expected = expected_gradient(case, slopes)
    found = run_gradient(case, slopes, torch.full_like(case.logits, math.nan))
    columns = case.columns.num_columns
    assert torch.equal(found[:, columns:], torch.zeros_like(found[:, columns:]))
    # The interpreter cuts bf16 off where a device rounds to nearest, at 2 ** -9.
    rtol = 1e-5 if found.dtype == torch.float32 else 2**-7
    # On the token 1 - p cancels, and so may log p + entropy.
    slack = 1e-6 * slopes.grad_logprob.abs()
    if slopes.grad_entropy is not None:
        slack = slack + 1e-6 * slopes.grad_entropy.abs()
    slack = slack.double()[:, None] * case.columns.inverse_temperature
    wrong = ((found.double() - expected).abs() > rtol * expected.abs() + slack) | found.isnan()
    assert not wrong.any(), (wrong.nonzero()[:5], found[wrong][:5], expected[wrong][:5])
    return found


def check_both(case: Case) -> None:
    check_statistics(case)
    for entropy in (False, True):
        slopes = slopes_of(case, entropy=entropy)
        out_of_place = check_gradient(case, slopes)
        in_place = run_gradient(case, slopes, case.logits) if entropy else out_of_place
        assert torch.equal(in_place, out_of_place)


# --- shapes and memory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 2, 7, 8, 9, 17, 128, 129, 1000])
def test_widths(width: int, dtype: torch.dtype) -> None:
    check_both(random_case(3, width, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [4097, 4099])
def test_a_width_that_is_no_multiple_of_the_step_in_use(width: int, dtype: torch.dtype) -> None:
    check_both(random_case(4, width, dtype=dtype, groups_per_step=1024))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [3, 8, 300])
def test_any_alignment_of_base_and_stride(width: int, dtype: torch.dtype) -> None:
    for offset, gap in zip(range(9), itertools.cycle((0, 1, 5, 8)), strict=False):
        check_both(random_case(3, width, dtype=dtype, stride=width + gap, offset=offset, groups_per_step=64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_may_lie_otherwise_in_memory_than_the_logits(dtype: torch.dtype) -> None:
    case = random_case(3, 301, dtype=dtype, stride=310, offset=3)
    slopes = slopes_of(case, entropy=True)
    expected = check_gradient(case, slopes)
    for offset, stride in ((0, 301), (3, 302), (5, 310)):
        out = torch.full((offset + 3 * stride,), math.nan, dtype=dtype)
        out = out[offset:].as_strided((3, 301), (stride, 1))
        assert torch.equal(run_gradient(case, slopes, out), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_written_between_rows(dtype: torch.dtype) -> None:
    storage = torch.full((3, 320), 7.0, dtype=dtype)
    case = random_case(3, 301, dtype=dtype, num_columns=290)
    slopes = slopes_of(case, entropy=True)
    slopes.grad_logprob[1] = slopes.grad_entropy[1] = 0.0
    run_gradient(case, slopes, storage[:, 3:304])
    assert bool((storage[:, :3] == 7.0).all()) and bool((storage[:, 304:] == 7.0).all())


@pytest.mark.parametrize("ids", [torch.int32, torch.int64])
def test_types_of_ids(ids: torch.dtype) -> None:
    case = random_case(16, 77)
    case.token_ids = case.token_ids.to(ids)
    check_both(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "num_columns"), [(300, 299), (300, 160), (300, 1), (12, 3), (300, 0)])
def test_padded_columns_may_hold_nan(width: int, num_columns: int, dtype: torch.dtype) -> None:
    case = random_case(3, width, dtype=dtype, num_columns=num_columns)
    case.logits[:, num_columns:] = math.nan
    if num_columns:
        check_both(case)
        return
    found = check_statistics(case)
    assert found[0].tolist() == [-INF] * 3 and not found[1:].any()
    slopes = slopes_of(random_case(3, 5), entropy=True)
    assert not run_gradient(case, slopes, torch.full_like(case.logits, math.nan)).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_of_uneven_width_add_up(dtype: torch.dtype) -> None:
    whole = random_case(5, 307, dtype=dtype, temperature=0.7)
    slopes = slopes_of(whole, entropy=True)
    joined = check_gradient(whole, slopes)
    bounds = [0, 100, 101, 250, 307]
    parts = []
    for start, end in itertools.pairwise(bounds):
        part = Case(logits=whole.logits[:, start:end], token_ids=whole.token_ids, temperature=0.7, vocab_start=start)
        found = check_statistics(part)
        owned = (whole.token_ids >= start) & (whole.token_ids < end)
        assert not found[3][~owned].any()
        parts.append(check_gradient(part, slopes))
    assert torch.equal(torch.cat(parts, 1), joined)


def test_ids_on_no_shard_are_no_target() -> None:
    case = random_case(4, 40, vocab_start=1000)
    case.token_ids = torch.tensor([-100, 999, 1040, 2**40])
    assert not check_statistics(case)[3].any()
    check_gradient(case, slopes_of(case, entropy=False))


def test_no_rows() -> None:
    case = random_case(0, 40)
    assert run_statistics(case).shape == (4, 0)
    nothing = torch.empty(0)
    slopes = Slopes(maximum=nothing, log_sum=nothing, entropy=nothing, grad_logprob=nothing, grad_entropy=None)
    run_gradient(case, slopes, torch.empty(0, 40))


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift", [10.0, -10.0, 120.0, -120.0, 1e4, -1e4])
def test_shifted_logits(shift: float, dtype: torch.dtype) -> None:
    case = random_case(4, 1003, dtype=dtype, shift=shift)
    found = check_statistics(case)
    logprob = found[3] - found[1].log()
    x = case.logits.double().log_softmax(1).gather(1, case.token_ids[:, None])[:, 0]
    torch.testing.assert_close(logprob.double(), x, rtol=0, atol=2e-5)
    check_both(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 2.0])
def test_temperatures(temperature: float, dtype: torch.dtype) -> None:
    check_both(random_case(4, 500, dtype=dtype, temperature=temperature))


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_far_apart(dtype: torch.dtype) -> None:
    check_both(random_case(4, 500, dtype=dtype, spread=300.0))
    case = random_case(2, 500, dtype=dtype)
    case.logits[0, 3], case.logits[1, 400] = -3e38, 3e38
    check_both(case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_impossible_tokens(dtype: torch.dtype) -> None:
    case = random_case(6, 1000, dtype=dtype)
    case.logits[0, :700] = -INF  # the first steps hold nothing
    case.logits[1, 300:] = -INF  # the last
    case.logits[2, case.token_ids[2]] = -INF  # the chosen one
    case.logits[3, ::2] = -INF
    case.logits[4, :999] = -INF  # all but one
    case.logits[5, 1:] = -INF
    check_both(case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_minus_infinity_has_no_maximum_and_no_nan(dtype: torch.dtype) -> None:
    case = random_case(3, 300, dtype=dtype)
    case.logits[:] = -INF
    case.token_ids[1] = 12345
    assert check_statistics(case).tolist() == [[-INF] * 3, [0.0] * 3, [0.0] * 3, [-INF, 0.0, -INF]]
    # One shard of a row whose maximum is on another.
    slopes = slopes_of(random_case(3, 300), entropy=True)
    check_gradient(case, slopes)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_one_hot_row_has_entropy_0_and_gradient_0(dtype: torch.dtype) -> None:
    case = random_case(3, 300, dtype=dtype)
    case.logits[:] = -500.0
    case.logits[torch.arange(3), case.token_ids] = 500.0
    found = check_statistics(case)
    assert found[1].tolist() == [1.0] * 3 and found[2].tolist() == [0.0] * 3 and found[3].tolist() == [0.0] * 3
    slopes = slopes_of(case, entropy=True)
    assert not slopes.entropy.any()
    assert not check_gradient(case, slopes).any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 150, 299])
def test_nan_reaches_sums_and_gradient_of_its_row_only(place: int, dtype: torch.dtype) -> None:
    case = random_case(3, 300, dtype=dtype)
    slopes = slopes_of(case, entropy=True)
    case.logits[1, place] = math.nan
    found = run_statistics(case)
    assert found[1].isnan().tolist() == [False, True, False]
    assert not found[:, [0, 2]].isnan().any()
    for each in (slopes, Slopes(**{**vars(slopes), "grad_entropy": None})):
        out = run_gradient(case, each, torch.zeros_like(case.logits))
        assert out.isnan().nonzero().tolist() == [[1, place]]
    slopes.log_sum[1] = math.nan
    assert run_gradient(case, slopes, torch.zeros_like(case.logits))[1].isnan().all()


def test_a_row_of_nan() -> None:
    case = random_case(2, 300)
    case.logits[0] = math.nan
    assert run_statistics(case)[1].isnan().tolist() == [True, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entropy", [False, True])
def test_rows_without_gradient_are_filled_with_0_whatever_they_hold(entropy: bool, dtype: torch.dtype) -> None:
    case = random_case(4, 301, dtype=dtype, num_columns=290)
    slopes = slopes_of(case, entropy=entropy)
    case.logits[1:3] = math.nan
    slopes.grad_logprob[1], slopes.grad_logprob[2] = 0.0, -0.0
    slopes.log_sum[1] = slopes.entropy[1] = slopes.maximum[1] = math.nan
    if slopes.grad_entropy is not None:
        slopes.grad_entropy[1:3] = 0.0
    out_of_place = run_gradient(case, slopes, torch.full_like(case.logits, math.nan))
    assert torch.equal(out_of_place[1:3], torch.zeros_like(out_of_place[1:3]))
    assert bool(out_of_place[[0, 3], :290].all())
    assert torch.equal(run_gradient(case, slopes, case.logits), out_of_place)


def test_entropy_alone_has_a_gradient() -> None:
    case = random_case(3, 300)
    slopes = slopes_of(case, entropy=True)
    slopes.grad_logprob[:] = 0.0
    assert bool(check_gradient(case, slopes).any())


def test_gradient_is_that_of_autograd() -> None:
    case = random_case(4, 300, temperature=0.7)
    slopes = slopes_of(case, entropy=True)
    x = case.logits.double().requires_grad_()
    logp = (x / 0.7).log_softmax(1)
    entropy = -(logp.exp() * logp).sum(1)
    chosen = logp.gather(1, case.token_ids[:, None])[:, 0]
    (expected,) = torch.autograd.grad((chosen * slopes.grad_logprob + entropy * slopes.grad_entropy).sum(), x)
    torch.testing.assert_close(check_gradient(case, slopes).double(), expected, rtol=1e-5, atol=1e-6)


def test_runs_are_bitwise_equal() -> None:
    case = random_case(3, 1003)
    slopes = slopes_of(case, entropy=True)
    first = run_statistics(case), run_gradient(case, slopes, torch.empty_like(case.logits))
    for _ in range(3):
        assert torch.equal(run_statistics(case), first[0])
        assert torch.equal(run_gradient(case, slopes, torch.empty_like(case.logits)), first[1])
