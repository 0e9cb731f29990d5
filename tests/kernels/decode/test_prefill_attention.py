"""Attention of prompts over themselves against PyTorch's, prompt by prompt."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from xrl.kernels.decode.prefill_attention import prefill_attention, reference_prefill_attention

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
LENGTHS = {"one token": [1], "several prompts": [5, 1, 40], "more than tiles and spans hold": [65, 300]}
HEADS = {"grouped": (4, 2, 32), "one key head": (6, 1, 16), "as many keys as queries": (2, 2, 48)}


def make_qkv(heads: tuple[int, int, int], num_tokens: int) -> Tensor:
    num_heads, num_kv_heads, dim = heads
    return torch.randn(num_tokens, num_heads + 2 * num_kv_heads, dim, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_each_prompt_attends_to_itself_alone(
    lengths: list[int], heads: tuple[int, int, int], dtype: torch.dtype
) -> None:
    qkv = make_qkv(heads, sum(lengths) + 3).to(dtype)  # three tokens of padding
    found = prefill_attention(qkv, lengths, num_heads=heads[0])
    expected = reference_prefill_attention(qkv.double(), lengths, num_heads=heads[0])
    assert found.dtype == dtype
    assert (found.double() - expected).abs().max() < TOLERANCE[dtype]
    assert not found[sum(lengths) :].any()


def test_a_head_size_without_a_kernel_is_computed_by_the_reference() -> None:
    qkv = make_qkv((2, 1, 20), 7)
    expected = reference_prefill_attention(qkv, [7], num_heads=2)
    assert torch.equal(prefill_attention(qkv, [7], num_heads=2), expected)


def test_a_prompt_is_computed_the_same_in_any_company() -> None:
    qkv = make_qkv(HEADS["grouped"], 30)
    together = prefill_attention(qkv, [10, 20], num_heads=4)
    alone = prefill_attention(qkv[10:].contiguous(), [20], num_heads=4)
    assert torch.equal(together[10:], alone)


@pytest.mark.parametrize(
    ("shape", "lengths", "named"),
    [
        ((7, 8), [7], "qkv must be"),
        ((7, 7, 16), [7], "heads"),
        ((7, 10, 16), [7], "heads"),
        ((7, 8, 16), [8], "more tokens than the 7 of qkv"),
        ((7, 8, 16), [0, 7], "lengths must be >= 1"),
    ],
)
def test_what_does_not_fit_together_is_refused(shape: tuple[int, ...], lengths: list[int], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        prefill_attention(torch.zeros(shape), lengths, num_heads=4)
