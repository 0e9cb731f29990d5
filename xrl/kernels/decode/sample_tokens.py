"""Draw one token a row from its logits, by inverse transform sampling, with the token's log-prob."""

from __future__ import annotations

import torch
from torch import Tensor

from xrl.kernels.arguments import address, check_floats, check_no_gradient, check_tensor
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
        ValueError: a wrong shape, type or device, or (on the CPU) a temperature or uniform out of range.
        TypeError: what should be a tensor is none.
    """
    check_floats("logits", logits, (None, None))
    rows, vocab_size = logits.shape[:1], logits.shape[1]
    if logits.dtype != torch.float32 or vocab_size == 0:
        raise ValueError(f"logits must be fp32 [N, V] with V >= 1, got {logits.dtype} {list(logits.shape)}")
    check_tensor("temperatures", temperatures, rows, like=logits)
    check_tensor("uniforms", uniforms, rows, like=logits, dtype=torch.float64)
    check_no_gradient("sample_tokens", logits=logits, temperatures=temperatures, uniforms=uniforms)
    module = native_module()
    if module is None or not logits.is_cpu:
        _check_draws(temperatures, uniforms)
        return reference_sample_tokens(logits, temperatures, uniforms)
    logits, temperatures, uniforms = logits.contiguous(), temperatures.contiguous(), uniforms.contiguous()
    tokens, logprobs = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    module.sample_tokens(
        logits=address(logits),
        num_rows=len(logits),
        vocab_size=vocab_size,
        temperatures=address(temperatures),
        uniforms=address(uniforms),
        token_ids=address(tokens),
        logprobs=address(logprobs),
        num_threads=num_threads(),
    )
    return tokens, logprobs


def _check_draws(temperatures: Tensor, uniforms: Tensor) -> None:
    """What the kernel checks itself."""
    if not temperatures.is_cpu:
        return
    if not bool((temperatures >= 0).all()):
        raise ValueError(f"temperatures must be >= 0, got {temperatures.tolist()}")
    if not bool(((uniforms >= 0) & (uniforms < 1)).all()):
        raise ValueError(f"uniforms must be in [0, 1), got {uniforms.tolist()}")


def reference_sample_tokens(logits: Tensor, temperatures: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The specification of `sample_tokens`, in plain PyTorch."""
    greedy = temperatures == 0
    # An infinite temperature would make a number of -inf / inf.
    highest = torch.finfo(torch.float32).max
    scaled = logits / torch.where(greedy, 1.0, temperatures.clamp(max=highest))[:, None]
    # fp32 sums over a large vocabulary lose the tail: a token of probability 1e-8 would share its neighbour's sum.
    logprobs = torch.log_softmax(scaled, dim=-1, dtype=torch.float64)
    cumulative = logprobs.exp().cumsum(dim=-1)
    targets = uniforms[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, targets, right=True)[:, 0]
    # Rounding can push a target onto the total: the last token with a probability is then the right one.
    last_possible = (cumulative < cumulative[:, -1:]).sum(dim=-1)
    tokens = torch.where(greedy, logits.argmax(dim=-1), torch.minimum(drawn, last_possible))
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0].float()
