"""The small operations of a decode step against their references: RMSNorm, rotary embedding, drawing of tokens."""

import pytest
import torch
from torch import Tensor

from xrl.kernels.decode.packed_linear import PackedLinear, padded_rows
from xrl.kernels.decode.rms_norm import reference_rms_norm, rms_norm
from xrl.kernels.decode.rope_cache import reference_rope_cache, rope_cache
from xrl.kernels.decode.sample_tokens import reference_sample_tokens, sample_tokens
from xrl.kernels.native import native_module

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1.6e-2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (5, 64), (256, 256), (0, 8)])
def test_rms_norm_equals_its_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape).to(dtype) * 3, torch.randn(shape[1]).to(dtype)
    expected = reference_rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), expected, rtol=TOLERANCE[dtype], atol=1e-6)


def rope_arguments(dtype: torch.dtype, head_dim: int, normed: bool) -> dict[str, Tensor | float | None]:
    torch.manual_seed(0)
    angles = torch.rand(50, head_dim // 2) * 6
    norms = torch.rand(2, head_dim).to(dtype) + 0.5
    return {
        "qkv": torch.randn(6, 4 + 2 * 2, head_dim).to(dtype),
        "cos": angles.cos(),
        "sin": angles.sin(),
        "positions": torch.tensor([0, 49, 3, 3, 17, 0], dtype=torch.int32),
        "q_norm": norms[0] if normed else None,
        "k_norm": norms[1] if normed else None,
        "eps": 1e-6,
        "key_cache": torch.zeros(5, 2, 8, head_dim, dtype=dtype),
        "value_cache": torch.zeros(5, 2, 8, head_dim, dtype=dtype),
        "slots": torch.tensor([0, 39, 9, -1, 22, -1], dtype=torch.int32),
    }


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("head_dim", [2, 16, 24, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rope_cache_equals_its_reference(dtype: torch.dtype, head_dim: int, normed: bool) -> None:
    ours, expected = (rope_arguments(dtype, head_dim, normed) for _ in range(2))
    rope_cache(**ours)
    reference_rope_cache(**expected)
    for name in ("qkv", "key_cache", "value_cache"):
        torch.testing.assert_close(ours[name], expected[name], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert ours["key_cache"].count_nonzero() > 0


@pytest.mark.parametrize("vocab_size", [1, 7, 512, 513, 1000, 151_936])
@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_sample_tokens_equals_its_reference(vocab_size: int, shift: float) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(16, vocab_size, generator=generator) * 3 + shift
    logits[::3, ::2] = -torch.inf if vocab_size > 1 else 0.0
    temperatures = torch.tensor([0.0, 0.7, 1.0, 2.0] * 4)
    uniforms = torch.rand(16, generator=generator, dtype=torch.float64)
    tokens, logprobs = sample_tokens(logits, temperatures, uniforms)
    expected_tokens, expected_logprobs = reference_sample_tokens(logits, temperatures, uniforms)
    assert torch.equal(tokens, expected_tokens)
    # A logit of 1e4 has a spacing of 1e-3 in fp32, which the reference divides by the temperature.
    torch.testing.assert_close(logprobs, expected_logprobs, rtol=0, atol=5e-6 if shift == 0 else 2e-3)


@pytest.mark.parametrize("draw", [sample_tokens, reference_sample_tokens])
def test_a_token_without_probability_is_never_drawn(draw) -> None:
    vocab_size = 2000
    logits = torch.full((4, vocab_size), -torch.inf)
    logits[0, 700] = logits[1, 0] = logits[2, 1999] = 0.0
    logits[3, [5, 1200]] = 0.0
    for u, last in ((0.0, 5), (0.4999, 5), (0.5001, 1200), (1 - 2.0**-53, 1200)):
        tokens, logprobs = draw(logits, torch.ones(4), torch.full((4,), u, dtype=torch.float64))
        assert tokens.tolist() == [700, 0, 1999, last]
        torch.testing.assert_close(logprobs, torch.tensor([0.0, 0.0, 0.0, -0.6931472]))


@pytest.mark.parametrize("draw", [sample_tokens, reference_sample_tokens])
def test_the_tail_of_a_large_vocabulary_keeps_its_share(draw) -> None:
    logits = torch.zeros(1, 151_936)
    logits[0, 0] = 18.0  # half of the mass is this token's, a share of 2e-6 each of the others'
    share = (logits[0].double().softmax(-1)).cumsum(0)
    uniforms = torch.linspace(0.4, 1, 65, dtype=torch.float64)[:-1]
    tokens, _ = draw(logits.repeat(64, 1), torch.ones(64), uniforms)
    expected = torch.searchsorted(share, uniforms * share[-1], right=True)
    assert (tokens - expected).abs().max() <= 1


def test_ties_of_greedy_go_to_the_first() -> None:
    tokens, logprobs = sample_tokens(
        torch.tensor([[1.0, 2.0, 2.0]]), torch.zeros(1), torch.zeros(1, dtype=torch.float64)
    )
    assert tokens.tolist() == [1]
    torch.testing.assert_close(logprobs, torch.log_softmax(torch.tensor([1.0, 2.0, 2.0]), dim=-1)[1:2])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_linear_and_what_it_fuses_equal_plain_products(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    weight, offset = torch.randn(24, 40).to(dtype), torch.randn(24).to(dtype) if bias else None
    linear = PackedLinear(weight, offset)
    for num_rows in (1, 3, 16, 33):
        x, other = torch.randn(num_rows, 40).to(dtype), torch.randn(num_rows, 24).to(dtype)
        product = torch.nn.functional.linear(x.double(), weight.double(), None if offset is None else offset.double())
        tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 0.2}
        torch.testing.assert_close(linear(x).double(), product, **tolerance)
        torch.testing.assert_close(linear.plus(x, other).double(), product + other, **tolerance)


def test_padding_leaves_few_distinct_row_counts() -> None:
    sizes = {padded_rows(n) for n in range(1, 257)}
    assert len(sizes) == 13
    assert all(padded_rows(n) >= n for n in range(1, 2000))


@pytest.mark.parametrize("draw", [sample_tokens, reference_sample_tokens])
def test_an_endless_temperature_draws_from_all_tokens_alike(draw) -> None:
    logits = torch.tensor([[1.0, -torch.inf, 3.0, 0.0]]).repeat(3, 1)
    uniforms = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    tokens, logprobs = draw(logits, torch.full((3,), torch.inf), uniforms)
    assert tokens.tolist() == [0, 2, 3]
    torch.testing.assert_close(logprobs, torch.full((3,), 1 / 3).log())


@pytest.mark.skipif(native_module() is None, reason="the reference divides by the temperature")
def test_a_temperature_without_an_inverse_takes_the_likeliest() -> None:
    logits = torch.tensor([[1.0, -torch.inf, 3.0, 0.0]])
    tokens, logprobs = sample_tokens(logits, torch.tensor([1e-44]), torch.tensor([0.9], dtype=torch.float64))
    assert (tokens.tolist(), logprobs.tolist()) == ([2], [0.0])


@pytest.mark.parametrize(
    ("name", "value"), [("temperatures", -1.0), ("temperatures", torch.nan), ("uniforms", 1.0), ("uniforms", torch.nan)]
)
def test_draws_that_no_distribution_can_be_made_of_are_refused(name: str, value: float) -> None:
    arguments = {"temperatures": torch.ones(2), "uniforms": torch.zeros(2, dtype=torch.float64)}
    arguments[name][1] = value
    with pytest.raises(ValueError, match=f"{name} must be"):
        sample_tokens(torch.zeros(2, 5), **arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_that_are_columns_of_a_matrix_are_read_as_such(dtype: torch.dtype) -> None:
    ours, expected = (rope_arguments(dtype, 16, True) for _ in range(2))
    wide = torch.stack([ours["q_norm"], ours["k_norm"]], dim=1)
    rope_cache(**ours | {"q_norm": wide[:, 0], "k_norm": wide[:, 1]})
    reference_rope_cache(**expected)
    torch.testing.assert_close(ours["qkv"], expected["qkv"], rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_a_bias_that_is_a_column_of_a_matrix_is_read_as_such() -> None:
    weight, wide, x = torch.randn(24, 40), torch.randn(24, 3), torch.randn(5, 40)
    expected = torch.nn.functional.linear(x, weight, wide[:, 1])
    torch.testing.assert_close(PackedLinear(weight, wide[:, 1])(x), expected, rtol=1e-5, atol=1e-4)
