"""`linear_logprob` on every backend of the CPU, against whole logits in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from xrl.kernels.head.backend import BackendName
from xrl.kernels.head.linear_logprob import linear_logprob, reference_linear_logprob
from xrl.kernels.shards import VocabShard

BACKENDS: tuple[BackendName, ...] = ("reference", "native")
T, R, H, V = 40, 77, 32, 1003
# Log-probs absolute; gradients relative to the largest of their tensor, as each is a sum over many rows.
LOGPROB_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-5}
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3}


def make_inputs(dtype: torch.dtype = torch.float32, *, scale: float = 1.0) -> dict[str, Tensor]:
    """Rows out of order, some of them several times, as when answers share a prompt."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, V, (R,), generator=generator)
    ids[0], ids[-1] = 0, V - 1
    return {
        "hidden": torch.randn(T, H, generator=generator).to(dtype),
        "weight": (scale * torch.randn(V, H, generator=generator)).to(dtype),
        "token_ids": ids,
        "rows": torch.randint(0, T, (R,), generator=generator),
    }


def upstream() -> tuple[Tensor, Tensor]:
    """Gradients of log-prob and entropy; 0 in a third of the rows."""
    generator = torch.Generator().manual_seed(1)
    grads = torch.randn(2, R, generator=generator) * torch.tensor([[1.0], [0.1]])
    grads[:, ::3] = 0.0
    return grads[0], grads[1]


def run(inputs: dict[str, Tensor], **options: Any) -> tuple[Any, Tensor, Tensor]:
    """(outputs, gradient of the hidden states, gradient of the weight)"""
    leaves = {name: inputs[name].clone().requires_grad_() for name in ("hidden", "weight")}
    out = linear_logprob(**(inputs | leaves), entropy_grad=True, **options)
    torch.autograd.backward([out.logprob, out.entropy], list(upstream()))
    return out, leaves["hidden"].grad, leaves["weight"].grad  # type: ignore[return-value]


def expected(inputs: dict[str, Tensor], *, temperature: float = 1.0) -> tuple[Any, Tensor, Tensor]:
    leaves = {name: inputs[name].double().requires_grad_() for name in ("hidden", "weight")}
    out = reference_linear_logprob(**(inputs | leaves), temperature=temperature)
    torch.autograd.backward([out.logprob, out.entropy], [grad.double() for grad in upstream()])
    return out, leaves["hidden"].grad, leaves["weight"].grad  # type: ignore[return-value]


def assert_gradients_equal(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], tolerance: float) -> None:
    for mine, exact in zip(found, wanted, strict=True):
        assert ((mine.double() - exact).abs() <= tolerance * exact.abs().max()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_bytes", [None, 4 * V * 7, 1])
def test_outputs_and_gradients_are_those_of_whole_logits(
    dtype: torch.dtype, backend: BackendName, temperature: float, chunk_bytes: int | None
) -> None:
    inputs = make_inputs(dtype)
    out, *gradients = run(inputs, temperature=temperature, chunk_bytes=chunk_bytes, backend=backend)
    wanted, *exact = expected(inputs, temperature=temperature)
    for name in ("logprob", "entropy", "logsumexp"):
        found = getattr(out, name).detach().double()
        torch.testing.assert_close(found, getattr(wanted, name).detach(), rtol=1e-6, atol=LOGPROB_TOLERANCE[dtype])
    assert [gradient.dtype for gradient in gradients] == [dtype, dtype]
    assert_gradients_equal(tuple(gradients), tuple(exact), GRADIENT_TOLERANCE[dtype])


def test_logits_far_from_zero_cost_no_digits() -> None:
    inputs = make_inputs(scale=30.0)
    out, *gradients = run(inputs)
    wanted, *exact = expected(inputs)
    # Logits of some hundred: fp32 products are off by 1e-4, and log-probs with them.
    torch.testing.assert_close(out.logprob.double(), wanted.logprob, rtol=1e-6, atol=5e-4)
    assert_gradients_equal(tuple(gradients), tuple(exact), 1e-3)


def test_padding_of_the_vocabulary_does_not_count() -> None:
    inputs = make_inputs()
    plain, *gradients = run(inputs)
    padded = inputs | {"weight": torch.cat([inputs["weight"], torch.full((9, H), 50.0)])}
    out, hidden, weight = run(padded, shard=VocabShard(num_columns=V))
    torch.testing.assert_close(out.logprob, plain.logprob)
    assert_gradients_equal((hidden, weight[:V]), (gradients[0].double(), gradients[1].double()), 1e-6)
    assert (weight[V:] == 0).all()


def test_all_rows_in_order_where_none_are_chosen() -> None:
    inputs = make_inputs()
    rows = torch.arange(T, dtype=torch.int32)
    ids = inputs["token_ids"][:T]
    chosen = linear_logprob(inputs["hidden"], inputs["weight"], ids, rows=rows)
    assert torch.equal(linear_logprob(inputs["hidden"], inputs["weight"], ids).logprob, chosen.logprob)


def test_no_rows_and_no_gradient_give_zeros() -> None:
    inputs = make_inputs()
    empty = torch.empty(0, dtype=torch.int64)
    hidden = inputs["hidden"].requires_grad_()
    out = linear_logprob(hidden, inputs["weight"], empty, rows=empty)
    assert out.logprob.shape == (0,)
    out.logprob.sum().backward()
    assert hidden.grad is not None and (hidden.grad == 0).all()


def test_gradient_goes_where_it_is_asked_for() -> None:
    inputs = make_inputs()
    weight = inputs["weight"].requires_grad_()
    linear_logprob(**(inputs | {"weight": weight})).logprob.sum().backward()
    assert inputs["hidden"].grad is None and weight.grad is not None
    hidden = inputs["hidden"].requires_grad_()
    linear_logprob(**(inputs | {"weight": weight.detach()})).logprob.sum().backward()
    assert hidden.grad is not None


def test_weight_gradient_is_added_to_megatrons_buffer() -> None:
    inputs = make_inputs()
    *_, exact = expected(inputs)
    weight = torch.nn.Parameter(inputs["weight"].clone())
    weight.main_grad = torch.ones(V, H)
    out = linear_logprob(**(inputs | {"weight": weight}), entropy_grad=True)
    torch.autograd.backward([out.logprob, out.entropy], list(upstream()))
    assert weight.grad is None
    assert_gradients_equal((weight.main_grad - 1,), (exact,), 1e-5)


def test_twenty_runs_are_equal_to_the_bit_and_order_of_rows_changes_nothing() -> None:
    inputs = make_inputs()
    first = run(inputs, chunk_bytes=4 * V * 16)
    for _ in range(19):
        again = run(inputs, chunk_bytes=4 * V * 16)
        assert torch.equal(first[0].logprob, again[0].logprob)
        assert torch.equal(first[1], again[1]) and torch.equal(first[2], again[2])
    order = torch.randperm(R, generator=torch.Generator().manual_seed(2))
    shuffled = inputs | {"rows": inputs["rows"][order], "token_ids": inputs["token_ids"][order]}
    torch.testing.assert_close(linear_logprob(**shuffled).logprob, first[0].logprob.detach()[order])


def test_gradients_pass_a_finite_difference_check() -> None:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(9, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    ids, rows = torch.tensor([0, 8, 4, 4]), torch.tensor([2, 0, 2, 1])

    def outputs(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        out = linear_logprob(h, w, ids, rows=rows, temperature=0.7, entropy_grad=True, chunk_bytes=8 * 9)
        return out.logprob, out.entropy

    assert torch.autograd.gradcheck(outputs, (hidden, weight))


@pytest.mark.slow
def test_compiled_graph_has_no_break_and_gives_the_same() -> None:
    inputs = make_inputs()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        out = linear_logprob(
            hidden * 2, weight, inputs["token_ids"], rows=inputs["rows"], shard=VocabShard(vocab_start=0)
        )
        return out.logprob.sum()

    gradients = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [inputs[name].clone().requires_grad_() for name in ("hidden", "weight")]
        call(*leaves).backward()
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, r"hidden must be floating point \[T, H\], got torch.float32 \[2, 3, 4\]"),
        ({"hidden": torch.zeros(2, 3, dtype=torch.int64)}, "hidden must be floating point"),
        ({"weight": torch.zeros(5, 4)}, r"weight must be torch.float32 \[V, H\] = \[V, 3\] like hidden \[2, 3\], got"),
        ({"weight": torch.zeros(5, 3, dtype=torch.bfloat16)}, r"weight must be torch.float32 .* got torch.bfloat16"),
        ({"weight": torch.zeros(5, 3, device="meta")}, "weight is on meta, hidden on cpu"),
        ({"token_ids": torch.zeros(3, dtype=torch.int64)}, r"token_ids must be int64 or int32 \[R\] = \[2\]"),
        ({"token_ids": torch.tensor([0, 5])}, "got 5 in row 1, which no shard holds"),
        ({"rows": torch.tensor([0, 2])}, r"rows must be in \[0, 2\), got 0 to 2"),
        ({"rows": torch.zeros(2)}, r"rows must be int64 or int32 \[R\], got torch.float32 \[2\]"),
        ({"rows": torch.zeros(2, dtype=torch.int64, device="meta")}, "rows are on meta, hidden on cpu"),
        ({"temperature": -1.0}, "temperature must be finite and > 0, got -1.0"),
        ({"temperature": math.inf}, "temperature must be finite and > 0"),
        ({"shard": VocabShard(num_columns=6)}, r"num_columns must be in \[0, 5\]"),
        ({"shard": VocabShard(sequence_parallel=True)}, "sequence_parallel needs the group"),
        ({"chunk_bytes": 0}, "chunk_bytes must be >= 1, got 0"),
        ({"backend": "cutlass"}, "backend 'cutlass' is unknown"),
    ],
)
def test_bad_input_is_named(changes: dict, message: str) -> None:
    arguments = {"hidden": torch.zeros(2, 3), "weight": torch.zeros(5, 3), "token_ids": torch.tensor([0, 4])}
    with pytest.raises(ValueError, match=message):
        linear_logprob(**(arguments | changes))
