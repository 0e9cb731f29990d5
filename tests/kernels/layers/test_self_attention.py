"""QK norm, rotary embedding and attention over a pack against the reference in fp64, forward and backward."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from xrl.kernels.layers.self_attention import (
    HeadSettings,
    PackedSequences,
    can_run,
    reference_self_attention,
    self_attention,
)

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
# (root lengths, branch lengths, root that each branch continues)
PACKS = {
    "one token": ([1], [], []),
    "plain sequences": ([5, 1, 40], [], []),
    "a prompt without answers and one with three": ([3, 9], [4, 1, 7], [1, 1, 1]),
    "tiles of queries and keys exactly full": ([64], [66, 132], [0, 0]),
    "one more than tiles hold": ([65], [67, 133], [0, 0]),
    "answers longer than a span of keys": ([300], [530, 2], [0, 0]),
}
HEADS = {"grouped": (4, 2, 32), "one key head": (6, 1, 16), "as many keys as queries": (2, 2, 48), "large": (2, 1, 128)}


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def packed(roots: list[int], branches: list[int], parents: list[int]) -> PackedSequences:
    lengths = int32([*roots, *branches])
    return PackedSequences(
        starts=(lengths.cumsum(0) - lengths).to(torch.int32),
        lengths=lengths,
        parents=int32([-1] * len(roots) + parents),
        num_tokens=int(lengths.sum()),
    )


def make_inputs(
    heads: tuple[int, int, int], num_tokens: int, *, normed: bool, dtype: torch.dtype
) -> tuple[Tensor, HeadSettings, Tensor]:
    """mixed, settings and an upstream gradient."""
    num_heads, num_kv_heads, dim = heads
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    angles = (torch.arange(num_tokens)[:, None] * torch.rand(dim // 2, generator=generator)).repeat(1, 2)
    settings = HeadSettings(
        cos=angles.cos().to(dtype),
        sin=angles.sin().to(dtype),
        q_weight=1 + 0.3 * random(dim) if normed else None,
        k_weight=1 + 0.3 * random(dim) if normed else None,
        eps=1e-6,
        scale=dim**-0.5,
    )
    return random(num_tokens, (num_heads + 2 * num_kv_heads) * dim), settings, random(num_tokens, num_heads * dim)


def run(
    attention: Callable[..., Tensor],
    mixed: Tensor,
    sequences: PackedSequences,
    settings: HeadSettings,
    upstream: Tensor,
    num_kv_heads: int,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Output and every gradient."""

    def leaf(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().to(dtype).requires_grad_()

    settings = dataclasses.replace(
        settings,
        cos=settings.cos.to(dtype),
        sin=settings.sin.to(dtype),
        q_weight=leaf(settings.q_weight),
        k_weight=leaf(settings.k_weight),
    )
    given = leaf(mixed)
    out = attention(given, sequences, settings, num_kv_heads=num_kv_heads)
    leaves = [tensor for tensor in (given, settings.q_weight, settings.k_weight) if tensor is not None]
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(dtype))]


def compare(sequences: PackedSequences, heads: tuple[int, int, int], *, normed: bool, dtype: torch.dtype) -> None:
    num_tokens = sequences.num_tokens + 3 * (sequences.step == 1)  # some that belong to no sequence
    mixed, settings, upstream = make_inputs(heads, num_tokens, normed=normed, dtype=dtype)
    assert can_run(dtype=dtype, device=mixed.device, head_dim=heads[2])
    ours = run(self_attention, mixed, sequences, settings, upstream, heads[1], dtype)
    exact = run(reference_self_attention, mixed, sequences, settings, upstream, heads[1], torch.float64)
    assert len(ours) == (4 if normed else 2)
    for mine, expected in zip(ours, exact, strict=True):
        assert mine.dtype == dtype and mine.shape == expected.shape
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(mine.double(), expected, rtol=4 * TOLERANCE[dtype], atol=TOLERANCE[dtype] * scale)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("normed", [True, False], ids=["normed", "plain"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)
def test_equals_its_reference(
    pack: tuple[list[int], list[int], list[int]], heads: tuple[int, int, int], normed: bool, dtype: torch.dtype
) -> None:
    compare(packed(*pack), heads, normed=normed, dtype=dtype)


def test_padded_rows_side_by_side_equal_the_reference() -> None:
    sequences = PackedSequences(
        starts=int32([0, 1, 2]), lengths=int32([7] * 3), parents=int32([-1] * 3), num_tokens=21, step=3
    )
    compare(sequences, HEADS["grouped"], normed=True, dtype=torch.float32)


def test_the_gradient_does_not_depend_on_the_number_of_threads() -> None:
    sequences = packed([20, 3], [9, 30, 1, 5], [0, 0, 1, 0])
    mixed, settings, upstream = make_inputs(HEADS["grouped"], sequences.num_tokens, normed=False, dtype=torch.float32)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(run(self_attention, mixed, sequences, settings, upstream, 2, torch.float32))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(left, right) for left, right in zip(found[0], other, strict=True))


def test_large_scores_do_not_overflow() -> None:
    sequences = packed([4], [6, 2], [0, 0])
    mixed, settings, upstream = make_inputs(HEADS["grouped"], sequences.num_tokens, normed=False, dtype=torch.float32)
    ours = run(self_attention, 100 * mixed, sequences, settings, upstream, 2, torch.float32)
    exact = run(reference_self_attention, 100 * mixed, sequences, settings, upstream, 2, torch.float64)
    assert all(tensor.isfinite().all() for tensor in ours)
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-4, atol=1e-2)


def test_a_token_that_is_not_a_number_spoils_no_other_sequence() -> None:
    sequences = packed([4], [6, 2], [0, 0])
    mixed, settings, upstream = make_inputs(HEADS["grouped"], sequences.num_tokens, normed=False, dtype=torch.float32)
    mixed[5] = torch.nan  # the second token of the first answer
    out = run(self_attention, mixed, sequences, settings, upstream, 2, torch.float32)[0]
    assert out[5:10].isnan().all()
    assert not out[:4].isnan().any() and not out[10:].isnan().any()


def test_what_the_kernels_cannot_take_is_told() -> None:
    cpu = torch.device("cpu")
    assert not can_run(dtype=torch.float64, device=cpu, head_dim=64)
    assert not can_run(dtype=torch.float32, device=cpu, head_dim=24)
    assert not can_run(dtype=torch.float32, device=torch.device("cuda"), head_dim=64)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["scalar", "avx2"])
def test_other_instruction_sets_give_the_same(isa: str) -> None:
    if os.environ.get("XRL_CPU_ISA"):
        return  # inside of this very test
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", __file__]
    done = subprocess.run(command, env={**os.environ, "XRL_CPU_ISA": isa}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
