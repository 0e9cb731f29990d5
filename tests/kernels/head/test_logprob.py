"""`vocab_parallel_logprob` on every backend of the CPU, against fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.kernels.head.logprob_cases import Case, cases
from xrl.kernels.head.backend import BackendName, why_not
from xrl.kernels.head.logprob import reference_logprob, vocab_parallel_logprob
from xrl.kernels.shards import VocabShard

CASES = {case.name: case for case in cases()}
BACKENDS: tuple[BackendName, ...] = ("reference", "native")

# Against fp64, of fp32 and bf16 inputs taken as exact: log-probs absolute, gradients relative to their row's largest.
LOGPROB_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}


@pytest.fixture(autouse=True)
def _native_is_built() -> None:
    assert why_not("native", torch.device("cpu")) == ""


def run(case: Case, backend: BackendName, grads: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprob, entropy, logsumexp, gradient of the logits)"""
    logits = case.logits.detach()
    whole = torch.empty_strided(logits.size(), logits.stride(), dtype=logits.dtype).copy_(logits).requires_grad_()
    out = vocab_parallel_logprob(
        whole,
        case.token_ids,
        temperature=case.temperature,
        shard=VocabShard(num_columns=case.num_columns),
        entropy_grad=True,
        backend=backend,
    )
    torch.autograd.backward([out.logprob, out.entropy], list(grads))
    assert whole.grad is not None
    return out.logprob.detach(), out.entropy.detach(), out.logsumexp, whole.grad


def expected(case: Case, grads: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    exact = case.logits.detach().double().requires_grad_()
    out = reference_logprob(exact, case.token_ids, temperature=case.temperature, num_columns=case.num_columns)
    torch.autograd.backward([out.logprob, out.entropy], [grad.double() for grad in grads])
    assert exact.grad is not None
    return out.logprob.detach(), out.entropy.detach(), out.logsumexp.detach(), exact.grad


def upstream(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = len(case.token_ids)
    return torch.randn(rows, generator=generator), 0.1 * torch.randn(rows, generator=generator)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_fp64(name: str, backend: BackendName) -> None:
    case, grads = CASES[name], upstream(CASES[name])
    logprob, entropy, logsumexp, gradient = run(case, backend, grads)
    wanted = expected(case, grads)
    atol = LOGPROB_TOLERANCE
    torch.testing.assert_close(logprob.double(), wanted[0], rtol=1e-6, atol=atol, equal_nan=True)
    torch.testing.assert_close(entropy.double(), wanted[1], rtol=1e-5, atol=atol, equal_nan=True)
    torch.testing.assert_close(logsumexp.double(), wanted[2], rtol=1e-6, atol=atol, equal_nan=True)
    if not case.finite or not len(case.token_ids):
        return
    columns = case.logits.shape[1] if case.num_columns is None else case.num_columns
    assert (gradient[:, columns:] == 0).all()
    target = case.token_ids.long()[:, None]
    error = (gradient.double() - wanted[3])[:, :columns].abs()
    tolerance = GRADIENT_TOLERANCE[case.logits.dtype]
    # The target's gradient is far larger than the others', so each is held against its own kind.
    scale = (grads[0].abs() + grads[1].abs())[:, None] / case.temperature
    assert (error.gather(1, target) <= tolerance * scale).all()
    rest = wanted[3][:, :columns].abs().scatter(1, target, 0.0)
    assert (error.scatter(1, target, 0.0) <= tolerance * rest.amax(1, keepdim=True) + 1e-12).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_hot_rows_have_no_entropy_and_a_finite_gradient(backend: BackendName) -> None:
    case = CASES["one-hot rows"]
    _, entropy, _, gradient = run(case, backend, upstream(case))
    assert (entropy == 0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("column", [50, 7000])
@pytest.mark.parametrize("gap", [0.5, 2.0, 5.0, 10.0, 15.0])
def test_confident_tokens_keep_their_gradient(gap: float, column: int, backend: BackendName) -> None:
    """1 - p is as exact as fp32 holds the sum of the row, wherever in the row the token is."""
    logits = 0.1 * torch.randn(8, 9001, generator=torch.Generator().manual_seed(4))
    logits[:, column] = gap + torch.tensor(9001.0).log()
    case = Case(name="", logits=logits, token_ids=torch.full((8,), column))
    grads = (torch.ones(8), torch.zeros(8))
    logprob, *_, gradient = run(case, backend, grads)
    *_, wanted = expected(case, grads)
    assert (logprob <= 0).all() and (gradient[:, column] >= 0).all()
    torch.testing.assert_close(gradient[:, column].double(), wanted[:, column], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_impossible_tokens_and_nan_come_through(backend: BackendName) -> None:
    case = CASES["chosen token -inf"]
    logprob, entropy, _, _ = run(case, backend, upstream(case))
    assert logprob[1] == -math.inf and entropy.isfinite().all()
    case = CASES["NaN"]
    logprob, entropy, logsumexp, gradient = run(case, backend, upstream(case))
    assert (
        logprob.isnan().tolist()
        == entropy.isnan().tolist()
        == logsumexp.isnan().tolist()
        == [False, False, True, False]
    )
    assert gradient[2].isnan().any() and gradient[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_gradient_are_not_read(backend: BackendName) -> None:
    case = CASES["NaN"]
    grads = (torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.zeros(4))
    *_, gradient = run(case, backend, grads)
    assert (gradient[1:3] == 0).all() and (gradient[[0, 3]] != 0).any()


def test_twenty_runs_are_equal_to_the_bit() -> None:
    case = CASES["float32 77x32768"]
    grads = upstream(case)
    first = run(case, "native", grads)
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(first, run(case, "native", grads), strict=True))


def test_order_and_number_of_rows_change_nothing() -> None:
    case = CASES["bfloat16 77x32768"]
    order = torch.randperm(77, generator=torch.Generator().manual_seed(3))[:40]
    whole = vocab_parallel_logprob(case.logits, case.token_ids)
    part = vocab_parallel_logprob(case.logits[order], case.token_ids[order])
    assert torch.equal(whole.logprob[order], part.logprob) and torch.equal(whole.entropy[order], part.entropy)


def test_gradients_pass_a_finite_difference_check() -> None:
    logits = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([0, 8, 4])

    def outputs(x: Tensor) -> tuple[Tensor, Tensor]:
        out = vocab_parallel_logprob(x, ids, temperature=0.7, entropy_grad=True)
        return out.logprob, out.entropy

    assert torch.autograd.gradcheck(outputs, (logits,))


def test_entropy_carries_a_gradient_only_on_request() -> None:
    logits = torch.randn(2, 5, requires_grad=True)
    ids = torch.tensor([0, 1])
    assert not vocab_parallel_logprob(logits, ids).entropy.requires_grad
    assert vocab_parallel_logprob(logits, ids, entropy_grad=True).entropy.requires_grad


@pytest.mark.slow
def test_compiled_graph_has_no_break_and_gives_the_same() -> None:
    logits, ids = torch.randn(4, 33), torch.tensor([0, 32, 5, 6])

    def loss(x: Tensor) -> Tensor:
        return vocab_parallel_logprob(x * 2, ids, shard=VocabShard(vocab_start=0)).logprob.sum()

    plain, compiled = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss(plain).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(compiled).backward()
    torch.testing.assert_close(compiled.grad, plain.grad)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(2, 3, 4)}, r"logits must be floating point \[R, V\], got torch.float32 \[2, 3, 4\]"),
        ({"logits": torch.zeros(2, 5, dtype=torch.int64)}, "logits must be floating point"),
        ({"token_ids": torch.zeros(3, dtype=torch.int64)}, r"token_ids must be int64 or int32 \[R\] = \[2\]"),
        ({"token_ids": torch.zeros(2)}, "token_ids must be int64 or int32"),
        ({"token_ids": torch.tensor([0, 5])}, "got 5 in row 1, which no shard holds"),
        ({"token_ids": torch.tensor([-100, 0])}, "got -100 in row 0"),
        ({"token_ids": torch.zeros(2, dtype=torch.int64, device="meta")}, "token_ids are on meta, logits on cpu"),
        ({"temperature": 0.0}, "temperature must be finite and > 0, got 0.0"),
        ({"temperature": math.nan}, "temperature must be finite and > 0"),
        ({"shard": VocabShard(num_columns=6)}, r"num_columns must be in \[0, 5\]"),
        ({"shard": VocabShard(vocab_start=-1)}, "vocab_start must be >= 0"),
        ({"backend": "cutlass"}, "backend 'cutlass' is unknown, known are: auto, reference, native, triton"),
        ({"backend": "triton"}, "backend 'triton' cannot run on cpu"),
    ],
)
def test_bad_input_is_named(changes: dict, message: str) -> None:
    arguments = {"logits": torch.zeros(2, 5), "token_ids": torch.tensor([0, 4])} | changes
    with pytest.raises(ValueError, match=message):
        vocab_parallel_logprob(**arguments)


def test_a_type_that_only_one_backend_takes_is_refused_by_the_others() -> None:
    logits, ids = torch.zeros(2, 5, dtype=torch.float16), torch.tensor([0, 4])
    assert vocab_parallel_logprob(logits, ids).logprob.isfinite().all()
    with pytest.raises(ValueError, match=r"takes float32 and bfloat16, got torch\.float16"):
        vocab_parallel_logprob(logits, ids, backend="native")
