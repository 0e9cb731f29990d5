"""The primitives of `backend.Backend` through the compiled CPU kernels."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xrl.kernels.arguments import address, check_floats, check_tensor
from xrl.kernels.head.grpo_rows import ROW_OUTPUTS, SINGLE_PASS_OUTPUTS, native_settings
from xrl.kernels.native import native_module
from xrl.kernels.threads import num_threads

if TYPE_CHECKING:
    from xrl.algorithms.loss_settings import TokenLossSettings
    from xrl.kernels.head.token_inputs import TokenInputs
    from xrl.kernels.shards import ShardColumns, Softmax

_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
# Where a gradient goes that nobody wants.
_NOWHERE = MappingProxyType({"gradient": 0, "gradient_stride": 0, "num_gradient_columns": 0})


def statistics(logits: Tensor, token_ids: Tensor, columns: ShardColumns) -> Tensor:
    """See `Backend.statistics`."""
    logit_rows = _rows(logits, columns.num_columns)
    ids = _ids(token_ids, len(logits))
    out = torch.empty(4, logits.shape[0], dtype=torch.float32)
    _kernel("logprob_statistics", logits)(
        **logit_rows,
        token_ids=address(ids),
        vocab_start=columns.vocab_start,
        inverse_temperature=columns.inverse_temperature,
        statistics=address(out),
        num_threads=num_threads(),
    )
    return out


def gradient(
    logits: Tensor,
    token_ids: Tensor,
    out: Tensor,
    *,
    columns: ShardColumns,
    softmax: Softmax,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
) -> None:
    """See `Backend.gradient`."""
    logit_rows = _rows(logits, columns.num_columns)
    ids = _ids(token_ids, len(logits))
    rows = _floats(
        len(logits),
        maximum=softmax.maximum,
        log_sum=softmax.log_sum,
        entropy=softmax.entropy,
        grad_logprob=grad_logprob,
        grad_entropy=grad_entropy,
    )
    _kernel("logprob_gradient", logits)(
        **logit_rows,
        token_ids=address(ids),
        vocab_start=columns.vocab_start,
        inverse_temperature=columns.inverse_temperature,
        **{name: address(row) for name, row in rows.items()},
        **_target("out", out, logits, columns.num_columns),
        num_threads=num_threads(),
    )


def grpo_rows(logprob: Tensor, entropy: Tensor, *, tokens: TokenInputs, settings: TokenLossSettings) -> Tensor:
    """See `Backend.grpo_rows`."""
    rows = _floats(
        len(logprob),
        logprob=logprob,
        entropy=entropy,
        **_named(tokens),
    )
    out = torch.empty(len(ROW_OUTPUTS), len(logprob), dtype=torch.float32)
    _module().grpo_rows(
        **{name: address(row) for name, row in rows.items()},
        num_rows=len(logprob),
        settings=native_settings(settings, with_reference=tokens.reference_logprobs is not None),
        out=address(out),
    )
    return out


def grpo_single_pass(
    logits: Tensor,
    token_ids: Tensor,
    gradient: Tensor | None,
    *,
    columns: ShardColumns,
    tokens: TokenInputs,
    settings: TokenLossSettings,
    factor: float,
) -> Tensor:
    """See `SinglePassBackend.grpo_single_pass`."""
    logit_rows = _rows(logits, columns.num_columns)
    ids = _ids(token_ids, len(logits))
    rows = _floats(len(logits), **_named(tokens))
    out = torch.empty(len(SINGLE_PASS_OUTPUTS), logits.shape[0], dtype=torch.float32)
    _kernel("grpo_single_pass", logits)(
        **logit_rows,
        token_ids=address(ids),
        vocab_start=columns.vocab_start,
        inverse_temperature=columns.inverse_temperature,
        **{name: address(row) for name, row in rows.items()},
        settings=native_settings(settings, with_reference=tokens.reference_logprobs is not None),
        factor=factor,
        **(_NOWHERE if gradient is None else _target("gradient", gradient, logits, columns.num_columns)),
        out=address(out),
        num_threads=num_threads(),
    )
    return out


def _module() -> Any:
    module = native_module()
    assert module is not None
    return module


def _kernel(name: str, logits: Tensor) -> Any:
    return getattr(_module(), f"{name}_{_SUFFIX[logits.dtype]}")


def _rows(logits: Tensor, num_columns: int) -> dict[str, int]:
    if not 0 <= num_columns <= logits.shape[1]:
        raise ValueError(f"num_columns must be in [0, {logits.shape[1]}], got {num_columns}")
    _check_adjacent("logits", logits)
    return {
        "logits": address(logits),
        "num_rows": logits.shape[0],
        "num_columns": num_columns,
        "row_stride": logits.stride(0),
    }


def _target(name: str, out: Tensor, logits: Tensor, num_columns: int) -> dict[str, int]:
    """Where a gradient goes: as many rows as the logits, and columns for all that count."""
    check_tensor(name, out, (len(logits), None), like=logits)
    if out.shape[1] < num_columns:
        raise ValueError(f"{name} must have the {num_columns} columns that count, got {out.shape[1]}")
    _check_adjacent(name, out)
    return {name: address(out), f"{name}_stride": out.stride(0), f"num_{name}_columns": out.shape[1]}


def _check_adjacent(name: str, rows: Tensor) -> None:
    if not rows.is_cpu or (rows.shape[1] > 1 and rows.stride(1) != 1):
        raise ValueError(f"{name} must be on the CPU with adjacent columns, got strides {list(rows.stride())}")


def _named(tokens: TokenInputs) -> dict[str, Tensor | None]:
    """As the kernels call them."""
    return {
        "old_logprobs": tokens.old_logprobs,
        "rollout_logprobs": tokens.rollout_logprobs,
        "reference_logprobs": tokens.reference_logprobs,
        "advantages": tokens.advantages,
        "shares": tokens.shares,
    }


def _ids(token_ids: Tensor, num_rows: int) -> Tensor:
    if token_ids.shape != (num_rows,) or token_ids.dtype not in (torch.int64, torch.int32) or not token_ids.is_cpu:
        found = f"{token_ids.dtype} {list(token_ids.shape)} on {token_ids.device}"
        raise ValueError(f"token_ids must be int64 or int32 [{num_rows}] on the CPU, got {found}")
    return token_ids.to(torch.int64).contiguous()


def _floats(num_rows: int, **columns: Tensor | None) -> dict[str, Tensor | None]:
    """One number a row each, as the kernels read it: fp64, which callers may pass, would be read as pairs of fp32."""
    for name, values in columns.items():
        if values is not None:
            check_floats(name, values, (num_rows,))
    return {
        name: None if values is None else values.to("cpu", torch.float32).contiguous()
        for name, values in columns.items()
    }
