"""`linear_grpo_loss` on every backend of the CPU, against whole logits in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.head.loss_calls import call_loss
from tests.kernels.head.test_grpo_loss import SETTINGS
from xrl.algorithms.loss_settings import TokenLossSettings
from xrl.kernels.head.backend import BackendName
from xrl.kernels.head.grpo_loss import grpo_token_loss
from xrl.kernels.head.linear_grpo import LinearGrpoLossOutput, linear_grpo_loss, reference_linear_grpo_loss
from xrl.kernels.head.linear_logprob import reference_linear_logprob
from xrl.kernels.head.token_inputs import TokenInputs
from xrl.kernels.shards import VocabShard

BACKENDS: tuple[BackendName, ...] = ("reference", "native")
T, R, H, V = 40, 64, 32, 997
CHUNK = 4 * V * 5  # several chunks, the last of them shorter


def make_inputs(*, temperature: float = 0.7, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Ratios on both sides of every bound; rows repeated, masked, and without an advantage."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(T, H, generator=generator).to(dtype), torch.randn(V, H, generator=generator).to(dtype)
    ids, rows = torch.randint(0, V, (R,), generator=generator), torch.randint(0, T, (R,), generator=generator)
    exact = reference_linear_logprob(hidden.double(), weight.double(), ids, rows=rows, temperature=temperature)
    logprob = exact.logprob.float()
    spread = torch.randn(R, generator=generator) * 0.4
    spread[:6] = torch.tensor([0.0, 50.0, -50.0, 5.0, -5.0, 0.0])
    advantages = torch.randn(R, generator=generator)
    advantages[5:8] = 0.0
    shares = torch.rand(R, generator=generator)
    shares[10:20] = 0.0
    return {
        "hidden": hidden,
        "weight": weight,
        "token_ids": ids,
        "rows": rows,
        "advantages": advantages,
        "shares": shares,
        "old_logprobs": logprob - spread,
        "rollout_logprobs": logprob - spread + 0.3 * torch.randn(R, generator=generator),
        "reference_logprobs": logprob - 0.5 * torch.randn(R, generator=generator),
        "temperature": temperature,
    }


def run(
    inputs: dict[str, Any], settings: TokenLossSettings, *, arrives: float = 1.0, **options: Any
) -> tuple[LinearGrpoLossOutput, Tensor, Tensor]:
    """(outputs, gradient of the hidden states, gradient of the weight)"""
    leaves = {name: inputs[name].clone().requires_grad_() for name in ("hidden", "weight")}
    out = call_loss(linear_grpo_loss, **(inputs | leaves), settings=settings, **({"chunk_bytes": CHUNK} | options))
    (out.loss * arrives).backward()
    return out, leaves["hidden"].grad, leaves["weight"].grad  # type: ignore[return-value]


def expected(inputs: dict[str, Any], settings: TokenLossSettings) -> tuple[Tensor, Tensor, Tensor]:
    exact = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    leaves = [exact[name].requires_grad_() for name in ("hidden", "weight")]
    loss = call_loss(reference_linear_grpo_loss, **exact, settings=settings)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def assert_close(found: Tensor, exact: Tensor, tolerance: float) -> None:
    assert ((found.double() - exact).abs() <= tolerance * exact.abs().max()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SETTINGS)
def test_loss_and_gradients_are_those_of_whole_logits(name: str, backend: BackendName, dtype: torch.dtype) -> None:
    inputs = make_inputs(dtype=dtype)
    out, *gradients = run(inputs, SETTINGS[name], backend=backend)
    loss, *exact = expected(inputs, SETTINGS[name])
    torch.testing.assert_close(out.loss.detach().double(), loss, rtol=2e-5, atol=1e-5)
    for found, wanted in zip(gradients, exact, strict=True):
        assert found.dtype == dtype
        assert_close(found, wanted, 2e-5 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_are_those_of_the_loss_on_whole_logits(name: str) -> None:
    inputs = make_inputs()
    tokens = run(inputs, SETTINGS[name])[0].tokens
    rest = {key: value for key, value in inputs.items() if key not in ("hidden", "weight", "rows")}
    whole = call_loss(
        grpo_token_loss, logits=inputs["hidden"][inputs["rows"]] @ inputs["weight"].t(), settings=SETTINGS[name], **rest
    )
    for field in ("token_loss", "logprob", "entropy", "ratio", "kl", "importance"):
        torch.testing.assert_close(getattr(tokens, field), getattr(whole, field), rtol=1e-4, atol=1e-5, msg=field)
    for field in ("clipped_low", "clipped_high", "clipped_dual", "importance_bounded"):
        assert torch.equal(getattr(tokens, field), getattr(whole, field)), field


@pytest.mark.parametrize("chunk_bytes", [1, 4 * V * 2, 4 * V * 13, None])
def test_size_of_chunks_changes_nothing(chunk_bytes: int | None) -> None:
    inputs, settings = make_inputs(), SETTINGS["everything"]
    out, *gradients = run(inputs, settings, chunk_bytes=chunk_bytes)
    same, *others = run(inputs, settings)
    torch.testing.assert_close(out.loss, same.loss)
    for found, wanted in zip(gradients, others, strict=True):
        assert_close(found, wanted.double(), 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_rows_may_hold_anything(backend: BackendName) -> None:
    inputs, settings = make_inputs(), SETTINGS["everything"]
    masked = inputs["shares"] == 0
    clean, *gradients = run(inputs, settings, backend=backend)
    spoilt = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    spoilt["token_ids"][masked] = -100
    for name in ("advantages", "old_logprobs", "rollout_logprobs", "reference_logprobs"):
        spoilt[name][masked] = torch.nan
    out, *others = run(spoilt, settings, backend=backend)
    assert torch.equal(out.loss, clean.loss) and torch.equal(out.tokens.logprob, clean.tokens.logprob)
    assert all(torch.equal(found, wanted) for found, wanted in zip(others, gradients, strict=True))
    assert (out.tokens.logprob[masked] == 0).all()


def test_hidden_states_that_only_masked_rows_use_may_be_nan() -> None:
    inputs, settings = make_inputs(), SETTINGS["plain"]
    used = inputs["rows"][inputs["shares"] != 0]
    unused = ~torch.isin(torch.arange(T), used)
    assert unused.any()
    _, clean, _ = run(inputs, settings)
    inputs["hidden"][unused] = torch.nan
    out, hidden, weight = run(inputs, settings)
    assert out.loss.isfinite() and weight.isfinite().all() and torch.equal(hidden, clean)


def test_rows_without_a_gradient_change_nothing_when_left_out() -> None:
    inputs = make_inputs()
    inputs["advantages"][20:] = 0.0
    _, hidden, weight = run(inputs, SETTINGS["plain"])
    _, *exact = expected(inputs, SETTINGS["plain"])
    assert_close(hidden, exact[0], 2e-5)
    assert_close(weight, exact[1], 2e-5)
    inputs["advantages"][:] = 0.0
    out, hidden, weight = run(inputs, SETTINGS["plain"])
    assert out.loss == 0 and (hidden == 0).all() and (weight == 0).all()


def test_all_rows_masked_and_no_rows_at_all() -> None:
    inputs = make_inputs()
    inputs["shares"][:] = 0.0
    out, hidden, weight = run(inputs, SETTINGS["everything"])
    assert out.loss == 0 and (hidden == 0).all() and (weight == 0).all()
    none = {name: value[:0] if name in ("token_ids", "rows") or name.endswith(("s", "logprobs")) else value
            for name, value in inputs.items() if isinstance(value, Tensor)}  # fmt: skip
    out, hidden, weight = run(none, SETTINGS["everything"])
    assert out.loss == 0 and out.tokens.logprob.shape == (0,) and (hidden == 0).all() and (weight == 0).all()


def test_gradient_that_arrives_multiplies() -> None:
    inputs = make_inputs()
    _, hidden, weight = run(inputs, SETTINGS["plain"])
    _, *scaled = run(inputs, SETTINGS["plain"], arrives=-2.5)
    torch.testing.assert_close(scaled[0], -2.5 * hidden)
    torch.testing.assert_close(scaled[1], -2.5 * weight)


def test_weight_gradient_goes_straight_to_megatrons_buffer_where_the_upstream_is_told() -> None:
    inputs, settings = make_inputs(), SETTINGS["everything"]
    _, hidden, weight = run(inputs, settings)
    parameter = torch.nn.Parameter(inputs["weight"].clone())
    parameter.main_grad = torch.ones(V, H)
    leaf = inputs["hidden"].clone().requires_grad_()
    arguments = inputs | {"hidden": leaf, "weight": parameter}
    out = call_loss(linear_grpo_loss, **arguments, settings=settings, upstream=4.0, chunk_bytes=CHUNK)
    (out.loss * 4.0).backward()
    assert parameter.grad is None
    torch.testing.assert_close(leaf.grad, 4 * hidden)
    torch.testing.assert_close(parameter.main_grad, 1 + 4 * weight, rtol=1e-4, atol=1e-5)

    out = call_loss(linear_grpo_loss, **arguments, settings=settings, upstream=4.0)
    with pytest.raises(RuntimeError, match="expected upstream gradient 4, got another"):
        out.loss.backward()


def test_upstream_counts_without_megatrons_buffer_too() -> None:
    inputs, settings = make_inputs(), SETTINGS["everything"]
    _, hidden, weight = run(inputs, settings)
    _, *scaled = run(inputs, settings, arrives=4.0, upstream=4.0)
    torch.testing.assert_close(scaled[0], 4 * hidden)
    torch.testing.assert_close(scaled[1], 4 * weight)
    with pytest.raises(RuntimeError, match="expected upstream gradient 4, got another"):
        run(inputs, settings, arrives=1.0, upstream=4.0)


def test_without_a_gradient_nothing_is_formed() -> None:
    inputs = make_inputs()
    weight = torch.nn.Parameter(inputs["weight"])
    weight.main_grad = torch.zeros(V, H)
    with torch.no_grad():
        out = call_loss(linear_grpo_loss, **(inputs | {"weight": weight}), settings=SETTINGS["plain"], upstream=1.0)
    assert not out.loss.requires_grad and (weight.main_grad == 0).all()


def test_twenty_runs_are_equal_to_the_bit() -> None:
    inputs, settings = make_inputs(), SETTINGS["everything"]
    first = run(inputs, settings)
    for _ in range(19):
        again = run(inputs, settings)
        assert torch.equal(first[0].loss, again[0].loss)
        assert torch.equal(first[1], again[1]) and torch.equal(first[2], again[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(5, 4)}, r"weight must be torch.float32 \[V, H\] = \[V, 3\] like hidden \[2, 3\]"),
        ({"advantages": torch.zeros(3)}, r"advantages must be fp32 \[R\] = \[2\], got torch.float32 \[3\]"),
        ({"shares": torch.zeros(2, 1)}, r"shares must be fp32 \[R\] = \[2\], got torch.float32 \[2, 1\]"),
        ({"token_ids": torch.tensor([0, 5])}, "got 5 in row 1, which no shard holds"),
        ({"settings": TokenLossSettings(kl_coef=0.1)}, "kl_coef is 0.1, which needs reference_logprobs, got None"),
        ({"settings": TokenLossSettings(importance_correction="mask")}, "needs rollout_logprobs, got None"),
        ({"temperature": 0.0}, "temperature must be finite and > 0, got 0.0"),
        ({"shard": VocabShard(sequence_parallel=True)}, "sequence_parallel needs the group"),
    ],
)
def test_bad_input_is_named(changes: dict, message: str) -> None:
    arguments: dict[str, Any] = {
        "hidden": torch.zeros(2, 3),
        "weight": torch.zeros(5, 3),
        "token_ids": torch.tensor([0, 4]),
        "advantages": torch.ones(2),
        "settings": TokenLossSettings(),
    }
    with pytest.raises(ValueError, match=message):
        call_loss(linear_grpo_loss, **(arguments | changes))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("upstream", [None, 0.3])
@pytest.mark.parametrize("frozen", [(), ("hidden",), ("weight",)])
def test_compiled_graph_has_no_break_and_gives_the_same(
    frozen: tuple[str, ...], upstream: float | None, dtype: torch.dtype
) -> None:
    inputs = make_inputs(dtype=dtype)
    rest = {name: value for name, value in inputs.items() if name not in ("hidden", "weight")}

    def loss(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        out = call_loss(
            linear_grpo_loss,
            hidden=hidden,
            weight=weight,
            **rest,
            settings=SETTINGS["everything"],
            chunk_bytes=CHUNK,
            upstream=upstream,
        )
        return 0.3 * out.loss, out.tokens.ratio

    torch.compiler.reset()  # how often one function is compiled is limited
    results = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [inputs[name].clone().requires_grad_(name not in frozen) for name in ("hidden", "weight")]
        outputs = call(*leaves)
        outputs[0].backward()
        gradients = [leaf.grad for leaf in leaves if leaf.requires_grad]
        results.append([each.detach() for each in outputs] + gradients)
    assert all(torch.equal(compiled, plain) for compiled, plain in zip(*results, strict=True))


@pytest.mark.slow
def test_other_numbers_of_rows_compile_once_more_at_most() -> None:
    inputs = make_inputs()
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def loss(hidden: Tensor, weight: Tensor, rows: Tensor, ids: Tensor, advantages: Tensor) -> Tensor:
        return linear_grpo_loss(
            hidden, weight, ids, TokenInputs(advantages=advantages), SETTINGS["plain"], rows=rows
        ).loss

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=count)
    for num_rows in (64, 63, 40, 17, 5):
        tokens = (inputs[name][:num_rows] for name in ("rows", "token_ids", "advantages"))
        compiled(inputs["hidden"], inputs["weight"], *tokens)
    assert len(graphs) <= 2
