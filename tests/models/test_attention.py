"""Packed attention with shared prompts equals attention over each whole sequence."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.samples import sample as make_sample
from xrl.parallel.cpu import prepare_megatron_for_cpu

prepare_megatron_for_cpu()

from xrl.data.packing import pack  # noqa: E402
from xrl.kernels.layers.layer_ops import reference_rotary  # noqa: E402
from xrl.models.attention import PackedAttention  # noqa: E402
from xrl.models.packed import attention_inputs  # noqa: E402
from xrl.models.shape import model_shape  # noqa: E402
from xrl.types import Sample  # noqa: E402

HEADS, KV_HEADS, DIM = 4, 2, 8
SHAPE = model_shape(
    {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 1,
        "hidden_size": HEADS * DIM,
        "intermediate_size": 64,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": 98,
        "rope_theta": 100.0,
    }
)


class _Config:
    kv_channels = DIM


def make_samples(lengths: list[tuple[int, list[int]]]) -> list[Sample]:
    """(prompt length, response lengths) for each group; every token id is unique within its sequence's group."""
    return [
        make_sample(
            [100 * group + place for place in range(prompt)],
            [10_000 + 1000 * group + 100 * number + place for place in range(response)],
            group_id=group,
        )
        for group, (prompt, responses) in enumerate(lengths)
        for number, response in enumerate(responses)
    ]


@pytest.mark.parametrize("multiple", [1, 64])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(
    "lengths",
    [
        [(3, [4, 4])],
        [(1, [1, 1]), (2, [1])],
        [(5, [2, 9, 1]), (2, [30, 3]), (11, [4, 4, 4])],
        [(40, [2, 2]), (3, [50, 1])],
    ],
)
def test_packed_attention_equals_separate_sequences(
    lengths: list[tuple[int, list[int]]], share: bool, multiple: int
) -> None:
    samples = make_samples(lengths)
    packed = pack(samples, share_prompts=share, multiple=multiple)
    generator = torch.Generator().manual_seed(0)
    inputs = attention_inputs(packed, SHAPE, dtype=torch.float32, device=torch.device("cpu"))
    total = len(packed.token_ids)
    query, key, value = (
        torch.randn(total, heads, DIM, generator=generator, requires_grad=True) for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    attention = PackedAttention(_Config(), 1, None, "self")  # type: ignore[arg-type]
    out = attention(query, key, value, None, packed_seq_params=inputs).view(total, HEADS, DIM)
    upstream = torch.randn(out.shape, generator=generator)
    out.backward(upstream)
    found = [query.grad, key.grad, value.grad]
    query.grad = key.grad = value.grad = None

    # The same, one sequence at a time: a prompt's rows serve all of its answers.
    expected = torch.zeros_like(out)
    rows_seen: set[int] = set()
    loss = torch.zeros(())
    for rows, positions in sequences(packed.token_ids.tolist(), packed.position_ids.tolist(), samples, share):
        whole = attend(query[rows], key[rows], value[rows], positions)
        new = [place for place, row in enumerate(rows) if row not in rows_seen]
        rows_seen.update(rows)
        loss = loss + (whole[new] * upstream[[rows[place] for place in new]]).sum()
        expected[[rows[place] for place in new]] = whole[new].detach()
    loss.backward()
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    for left, right in zip(found, (query.grad, key.grad, value.grad), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def sequences(
    token_ids: list[int], position_ids: list[int], samples: list[Sample], share: bool
) -> list[tuple[list[int], Tensor]]:
    """The rows of each whole sequence, in order, with its positions."""
    found = []
    used: set[int] = set()
    for sample in samples:
        wanted = sample.token_ids[:-1].tolist()
        if share:
            rows = [
                next(
                    row
                    for row, found_here in enumerate(zip(token_ids, position_ids, strict=True))
                    if found_here == (token, place)
                )
                for place, token in enumerate(wanted)
            ]
        else:
            # A prompt stands there once for each of its answers: take a whole sequence that is not taken yet.
            start = next(
                start
                for start in range(len(token_ids))
                if start not in used and token_ids[start : start + len(wanted)] == wanted and position_ids[start] == 0
            )
            rows = list(range(start, start + len(wanted)))
        used.update(rows)
        found.append((rows, torch.arange(len(rows))))
    return found


def attend(query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
    frequencies = 1.0 / 100.0 ** (torch.arange(0, DIM, 2, dtype=torch.float32) / DIM)
    angles = torch.outer(positions.float(), frequencies).repeat(1, 2)
    q, k = (reference_rotary(x, angles.cos(), angles.sin()) for x in (query, key))
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, value))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
