"""Paged decode attention against its reference, and the reference against plain attention."""

import dataclasses

import pytest
import torch
from torch import Tensor

from xrl.kernels.decode.decode_attention import PagedContext, decode_attention, reference_decode_attention
from xrl.kernels.native import native_module

needs_native = pytest.mark.skipif(native_module() is None, reason="xrl._C is not built")


def make_batch(
    prompt_lengths: list[int],
    group_sizes: list[int],
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    max_own: int = 40,
    num_padding: int = 0,
) -> tuple[Tensor, Tensor, Tensor, PagedContext]:
    """A random batch over scattered cache blocks; a group of padding rows, where asked for, comes last."""
    generator = torch.Generator().manual_seed(0)
    prompt_lengths = prompt_lengths + [0] * (num_padding > 0)
    sizes = torch.tensor(group_sizes + [num_padding] * (num_padding > 0))
    num_rows = int(sizes.sum())
    own_lengths = torch.randint(1, max_own + 1, (num_rows,), generator=generator)
    if num_padding:
        own_lengths[-num_padding:] = 0
    prompt_width = max(1, -(-max(prompt_lengths) // block_size))
    row_width = -(-max_own // block_size) + 1
    num_blocks = len(sizes) * prompt_width + num_rows * row_width
    blocks = torch.randperm(num_blocks, generator=generator).int()
    context = PagedContext(
        group_starts=torch.cat((torch.zeros(1), sizes.cumsum(0))).int(),
        prompt_blocks=blocks[: len(sizes) * prompt_width].view(len(sizes), prompt_width),
        prompt_lengths=torch.tensor(prompt_lengths).int(),
        row_blocks=blocks[len(sizes) * prompt_width :].view(num_rows, row_width),
        row_lengths=own_lengths.int(),
    )
    keys, values = torch.randn(2, num_blocks, num_kv_heads, block_size, head_dim, generator=generator).to(dtype)
    query = torch.randn(num_rows, num_heads + 2 * num_kv_heads, head_dim, generator=generator).to(dtype)[:, :num_heads]
    return query, keys, values, context


def plain_attention(query: Tensor, keys: Tensor, values: Tensor, context: PagedContext) -> Tensor:
    """Row by row in fp64, from the definition."""
    num_heads, head_dim = query.shape[1:]
    block_size = keys.shape[2]
    out = torch.zeros(query.shape, dtype=torch.float64)
    for group in range(len(context.prompt_lengths)):
        for row in range(int(context.group_starts[group]), int(context.group_starts[group + 1])):
            if context.row_lengths[row] == 0:
                continue
            places = [
                (int(context.prompt_blocks[group, i // block_size]), i % block_size)
                for i in range(context.prompt_lengths[group])
            ]
            places += [
                (int(context.row_blocks[row, i // block_size]), i % block_size) for i in range(context.row_lengths[row])
            ]
            key = torch.stack([keys[block, :, offset] for block, offset in places]).double()
            value = torch.stack([values[block, :, offset] for block, offset in places]).double()
            for head in range(num_heads):
                kv_head = head * keys.shape[1] // num_heads
                weights = (key[:, kv_head] @ query[row, head].double() / head_dim**0.5).softmax(-1)
                out[row, head] = weights @ value[:, kv_head]
    return out


SHAPES = {
    "groups of eight": {"prompt_lengths": [51, 40, 61], "group_sizes": [8, 8, 8]},
    "uneven groups": {"prompt_lengths": [1, 16, 17], "group_sizes": [1, 5, 2]},
    "one long group": {"prompt_lengths": [300], "group_sizes": [20], "max_own": 200},
    "a group past its end": {"prompt_lengths": [5], "group_sizes": [1], "max_own": 1},
    "padding rows": {"prompt_lengths": [9, 30], "group_sizes": [3, 2], "num_padding": 3},
    "no grouped queries": {"prompt_lengths": [9, 30], "group_sizes": [3, 2], "num_heads": 2},
    "seven queries a KV head": {"prompt_lengths": [9, 30], "group_sizes": [3, 2], "num_heads": 14},
    "thirty-two queries a KV head": {"prompt_lengths": [9], "group_sizes": [2], "num_heads": 32, "num_kv_heads": 1},
    "head size 16": {"prompt_lengths": [20, 3], "group_sizes": [3, 2], "head_dim": 16},
    "head size 32": {"prompt_lengths": [20, 3], "group_sizes": [3, 2], "head_dim": 32},
    "head size 128": {"prompt_lengths": [20, 3], "group_sizes": [3, 2], "head_dim": 128},
    "a head size without a kernel": {"prompt_lengths": [20, 3], "group_sizes": [3, 2], "head_dim": 24},
    "other blocks": {"prompt_lengths": [20, 3], "group_sizes": [3, 2], "block_size": 32},
    "a block size without a kernel": {"prompt_lengths": [20, 3], "group_sizes": [3, 2], "block_size": 12},
}


@pytest.mark.parametrize("implementation", [decode_attention, reference_decode_attention])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_every_row_attends_to_its_prompt_and_its_own_tokens(shape: dict, implementation) -> None:
    batch = make_batch(**shape)
    torch.testing.assert_close(implementation(*batch).double(), plain_attention(*batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", ["groups of eight", "one long group", "padding rows", "head size 16"])
def test_bf16_is_the_fp64_answer_rounded(shape: str) -> None:
    batch = make_batch(**SHAPES[shape], dtype=torch.bfloat16)
    torch.testing.assert_close(decode_attention(*batch).double(), plain_attention(*batch), rtol=8e-3, atol=8e-3)


def test_large_scores_do_not_overflow() -> None:
    query, keys, values, context = make_batch(**SHAPES["uneven groups"])
    batch = (query * 1e3, keys, values, context)
    torch.testing.assert_close(decode_attention(*batch).double(), plain_attention(*batch), rtol=1e-4, atol=1e-4)


@needs_native
def test_stale_numbers_beyond_a_context_do_not_count() -> None:
    query, keys, values, context = make_batch([20], [2], max_own=10)
    expected = decode_attention(query, keys, values, context)
    keys[context.prompt_blocks[0, 1], :, 4:] = 1e30
    values[context.prompt_blocks[0, 1], :, 4:] = 1e30
    assert torch.equal(decode_attention(query, keys, values, context), expected)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    query, keys, values, context = make_batch([20, 30], [8, 3])
    alone = dataclasses.replace(
        context,
        group_starts=torch.tensor([0, 1], dtype=torch.int32),
        prompt_blocks=context.prompt_blocks[1:],
        prompt_lengths=context.prompt_lengths[1:],
        row_blocks=context.row_blocks[9:10],
        row_lengths=context.row_lengths[9:10],
    )
    together = decode_attention(query, keys, values, context)[9]
    torch.testing.assert_close(decode_attention(query[9:10], keys, values, alone)[0], together, rtol=1e-6, atol=1e-6)


def test_misfits_are_refused_by_name() -> None:
    query, keys, values, context = make_batch([20], [2])
    with pytest.raises(ValueError, match=r"value_cache must be .* \[\d+, 2, 16, \d+\] on cpu, got"):
        decode_attention(query, keys, values[:1], context)
    with pytest.raises(ValueError, match="query must have a multiple of the 2 KV heads"):
        decode_attention(query[:, :3], keys, values, context)
    with pytest.raises(ValueError, match="key_cache must be torch.bfloat16"):
        decode_attention(query.bfloat16(), keys, values, context)
    with pytest.raises(ValueError, match="row_lengths must be int32"):
        decode_attention(query, keys, values, dataclasses.replace(context, row_lengths=context.row_lengths.long()))
    with pytest.raises(ValueError, match=r"row_blocks must be int32 \[2, \*\]"):
        decode_attention(query, keys, values, dataclasses.replace(context, row_blocks=context.row_blocks[:1]))
