"""The primitives of `backend.Backend` through the compiled CPU kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xrl.kernels.native import native_module
from xrl.kernels.threads import num_threads

if TYPE_CHECKING:
    from xrl.kernels.grpo_rows import GrpoRowParams

_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


def statistics(
    logits: Tensor, token_ids: Tensor, *, inverse_temperature: float, vocab_start: int, num_columns: int
) -> Tensor:
    """See `Backend.statistics`."""
    out = torch.empty(4, logits.shape[0], dtype=torch.float32)
    ids = token_ids.to(torch.int64).contiguous()
    _kernel("logprob_statistics", logits)(
        *_rows(logits, num_columns),
        ids.data_ptr(),
        vocab_start,
        inverse_temperature,
        out.data_ptr(),
        num_threads(),
    )
    return out


def gradient(
    logits: Tensor,
    token_ids: Tensor,
    out: Tensor,
    *,
    inverse_temperature: float,
    vocab_start: int,
    num_columns: int,
    maximum: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
) -> None:
    """See `Backend.gradient`."""
    ids = token_ids.to(torch.int64).contiguous()
    rows = [maximum, log_sum, entropy, grad_logprob, grad_entropy]
    rows = [None if row is None else row.contiguous() for row in rows]
    _kernel("logprob_gradient", logits)(
        *_rows(logits, num_columns),
        ids.data_ptr(),
        vocab_start,
        inverse_temperature,
        *(_address(row) for row in rows),
        out.data_ptr(),
        out.stride(0),
        out.shape[1],
        num_threads(),
    )


def grpo_rows(
    *,
    logprob: Tensor,
    entropy: Tensor,
    old: Tensor | None,
    rollout: Tensor | None,
    reference: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    params: GrpoRowParams,
) -> Tensor:
    """See `Backend.grpo_rows`."""
    out = torch.empty(10, logprob.shape[0], dtype=torch.float32)
    rows = [logprob, entropy, old, rollout, reference, advantages, weights]
    # The kernel reads addresses: fp64, which callers may pass, would be read as pairs of fp32.
    rows = [None if row is None else row.to(torch.float32).contiguous() for row in rows]
    _module().grpo_rows(*(_address(row) for row in rows), logprob.shape[0], params.as_tuple(), out.data_ptr())
    return out


def grpo_single_pass(
    logits: Tensor,
    token_ids: Tensor,
    gradient: Tensor | None,
    *,
    inverse_temperature: float,
    vocab_start: int,
    num_columns: int,
    old: Tensor | None,
    rollout: Tensor | None,
    reference: Tensor | None,
    advantages: Tensor,
    weights: Tensor,
    params: GrpoRowParams,
    factor: float,
) -> Tensor:
    """See `SinglePassBackend.grpo_single_pass`."""
    out = torch.empty(12, logits.shape[0], dtype=torch.float32)
    ids = token_ids.to(torch.int64).contiguous()
    rows = [old, rollout, reference, advantages, weights]
    rows = [None if row is None else row.to(torch.float32).contiguous() for row in rows]
    _kernel("grpo_single_pass", logits)(
        *_rows(logits, num_columns),
        ids.data_ptr(),
        vocab_start,
        inverse_temperature,
        *(_address(row) for row in rows),
        params.as_tuple(),
        factor,
        *((0, 0, 0) if gradient is None else (gradient.data_ptr(), gradient.stride(0), gradient.shape[1])),
        out.data_ptr(),
        num_threads(),
    )
    return out


def _module() -> Any:
    module = native_module()
    assert module is not None
    return module


def _kernel(name: str, logits: Tensor) -> Any:
    return getattr(_module(), f"{name}_{_SUFFIX[logits.dtype]}")


def _rows(logits: Tensor, num_columns: int) -> tuple[int, int, int, int]:
    return logits.data_ptr(), logits.shape[0], num_columns, logits.stride(0)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
