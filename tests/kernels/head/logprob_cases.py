"""Cases of `vocab_parallel_logprob` that every backend is tested on: ordinary shapes and every edge."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Case:
    """Logits and chosen tokens, and how to look at them."""

    name: str
    logits: Tensor  # [R, V]
    token_ids: Tensor  # [R]
    temperature: float = 1.0
    num_columns: int | None = None  # None: all count
    finite: bool = True  # whether log-probs and gradients are finite numbers


def _random(num_rows: int, vocab_size: int, *, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(num_rows, vocab_size, generator=generator)).to(dtype)
    ids = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    if num_rows > 1:
        ids[0], ids[-1] = 0, vocab_size - 1
    return logits, ids


def cases(*, large: bool = True) -> Iterator[Case]:
    """All of them; without `large` only those that an interpreter gets through."""
    shapes = [(0, 17), (1, 1), (2, 7), (5, 17), (3, 1000), (2, 4097)]
    if large:
        shapes += [(77, 32_768), (2, 50_257), (2, 151_936), (2, 152_063), (1025, 1000)]
    for dtype in (torch.float32, torch.bfloat16):
        for number, (rows, columns) in enumerate(shapes):
            logits, ids = _random(rows, columns, seed=number, dtype=dtype)
            yield Case(name=f"{dtype} {rows}x{columns}".removeprefix("torch."), logits=logits, token_ids=ids)
    logits, ids = _random(4, 1003, seed=50)
    for temperature in (0.1, 0.7, 2.0):
        yield Case(name=f"temperature {temperature}", logits=logits, token_ids=ids, temperature=temperature)
    yield Case(name="int32 ids", logits=logits, token_ids=ids.int())
    for shift in (10.0, -10.0, 120.0, -120.0, 1e4, -1e4):
        yield Case(name=f"shifted by {shift:g}", logits=logits + shift, token_ids=ids)
    yield Case(name="shifted, at temperature 0.7", logits=logits + 1e4, token_ids=ids, temperature=0.7)

    first_block = logits.clone()
    first_block[:, :900] = -torch.inf
    yield Case(name="first blocks all -inf", logits=first_block, token_ids=torch.full_like(ids, 1000))
    one_hot = torch.full((3, 100), -torch.inf)
    one_hot[:, 7] = 2.0
    yield Case(name="one-hot rows", logits=one_hot, token_ids=torch.full((3,), 7))
    chosen = logits.clone()
    chosen[1, int(ids[1])] = -torch.inf
    yield Case(name="chosen token -inf", logits=chosen, token_ids=ids, finite=False)
    nan = logits.clone()
    nan[2, 5] = torch.nan
    yield Case(name="NaN", logits=nan, token_ids=ids, finite=False)
    padded = torch.cat([logits, torch.full((4, 61), torch.nan)], dim=1)
    yield Case(name="padding of NaN", logits=padded, token_ids=ids, num_columns=1003)

    if large:
        # Kernels go block by block: their maximum, and what was summed before, must follow.
        rising, ids = _random(3, 9001, seed=52)
        rising += torch.linspace(-300, 300, 9001)
        ids[0] = 9000
        yield Case(name="rising from block to block", logits=rising, token_ids=ids)
        yield Case(name="falling from block to block", logits=rising.flip(1).contiguous(), token_ids=8999 - ids % 9000)
        jump, ids = _random(3, 9001, seed=53)
        jump[:, 7000] = 200.0
        yield Case(name="one logit far above all before it", logits=jump.bfloat16(), token_ids=ids)

    wide, ids = _random(6, 1024, seed=51)
    yield Case(name="strided rows", logits=wide[::2, :1000], token_ids=ids[::2] % 1000)
    yield Case(name="rows at odd addresses", logits=wide[:, 1:], token_ids=ids % 1023)
    yield Case(name="columns apart", logits=wide[:, ::2], token_ids=ids % 512)
    for dtype in (torch.float32, torch.bfloat16):
        flat = wide.to(dtype).flatten()[3 : 3 + 5 * 1001].view(5, 1001)
        yield Case(name=f"{dtype} misaligned base".removeprefix("torch."), logits=flat, token_ids=ids[:5] % 1001)
