"""Draw one token a row from its logits, by inverse transform sampling, with the token's log-prob."""

from __future__ import annotations

import torch
from torch import Tensor

from xrl.kernels.native import native_module
from xrl.kernels.threads import num_threads


def sample_tokens(logits: Tensor, temperatures: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw t with probability softmax(logits / temperature)[t]; temperature 0 takes the likeliest token.

    The token is the first whose cumulative probability, in the order of the vocabulary, exceeds the row's uniform:
    equal inputs give equal tokens whatever else is in the batch, and a token of probability 0 is never drawn.
    Logits of -inf (filtered tokens) have probability 0.

    Args:
        logits: [N, V] fp32
        temperatures: [N] fp32, 0 for greedy
        uniforms: [N] fp64 in [0, 1)

    Returns:
        token ids [N] int64, and log softmax(logits / temperature)[id] [N] fp32 (temperature 1 where it is 0)

    Raises:
        ValueError: a wrong shape or type.
    """
    rows = logits.shape[:1]
    if logits.ndim != 2 or logits.dtype != torch.float32 or logits.shape[1] == 0:
        raise ValueError(f"logits must be fp32 [N, V] with V >= 1, got {logits.dtype} {list(logits.shape)}")
    if temperatures.dtype != torch.float32 or temperatures.shape != rows:
        raise ValueError(f"temperatures must be fp32 [{rows[0]}], got {temperatures.dtype} {list(temperatures.shape)}")
    if uniforms.dtype != torch.float64 or uniforms.shape != rows:
        raise ValueError(f"uniforms must be fp64 [{rows[0]}], got {uniforms.dtype} {list(uniforms.shape)}")
    module = native_module()
    if module is None or logits.device.type != "cpu":
        return sample_tokens_reference(logits, temperatures, uniforms)
    logits, temperatures, uniforms = logits.contiguous(), temperatures.contiguous(), uniforms.contiguous()
    tokens, logprobs = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    module.sample_tokens(
        logits.data_ptr(),
        *logits.shape,
        temperatures.data_ptr(),
        uniforms.data_ptr(),
        tokens.data_ptr(),
        logprobs.data_ptr(),
        num_threads(),
    )
    return tokens, logprobs


def sample_tokens_reference(logits: Tensor, temperatures: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The specification of `sample_tokens`, in plain PyTorch."""
    greedy = temperatures == 0
    scaled = logits / torch.where(greedy, 1.0, temperatures)[:, None]
    # fp32 sums over a large vocabulary lose the tail: a token of probability 1e-8 would share its neighbour's sum.
    logprobs = torch.log_softmax(scaled, dim=-1, dtype=torch.float64)
    cumulative = logprobs.exp().cumsum(dim=-1)
    targets = uniforms[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, targets, right=True)[:, 0]
    # Rounding can push a target onto the total: the last token with a probability is then the right one.
    last_possible = (cumulative < cumulative[:, -1:]).sum(dim=-1)
    tokens = torch.where(greedy, logits.argmax(dim=-1), torch.minimum(drawn, last_possible))
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0].float()
