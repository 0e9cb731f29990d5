"""`backend.SinglePassBackend` by the compiled CUDA kernels, on the current stream of the tensors' device.

Tensors may be freed as soon as a function returns: torch gives their memory to later work of the same stream only.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xrl.kernels.head.grpo_rows import ROW_OUTPUTS, SINGLE_PASS_OUTPUTS, native_settings
from xrl.kernels.native import native_module

if TYPE_CHECKING:
    from xrl.algorithms.loss_settings import TokenLossSettings
    from xrl.kernels.head.token_inputs import TokenInputs
    from xrl.kernels.shards import ShardColumns, Softmax

_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}


def why_not(module: ModuleType) -> str:
    """Why the compiled CUDA kernels cannot run on the current device, in a sentence; empty where they can."""
    built = getattr(module, "cuda_built", lambda: False)()
    if not built:
        return "xrl._C was built without CUDA kernels"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return _why_not_on(module, torch.cuda.current_device())


@functools.cache
def _why_not_on(module: ModuleType, device_index: int) -> str:
    with torch.cuda.device(device_index):
        reason = module.cuda_why_not()
    if not reason:
        return ""
    name, built_for = torch.cuda.get_device_name(device_index), ", ".join(module.cuda_architectures())
    return f"xrl._C has CUDA kernels for {built_for}, and on {name} CUDA says: {reason}"


def statistics(logits: Tensor, token_ids: Tensor, columns: ShardColumns) -> Tensor:
    """See `Backend.statistics`."""
    out = torch.empty(4, logits.shape[0], dtype=torch.float32, device=logits.device)
    token_ids = token_ids.contiguous()
    with torch.cuda.device(logits.device):
        _kernel("cuda_logprob_statistics", logits)(
            **_rows(logits, columns.num_columns),
            **_ids(token_ids),
            vocab_start=columns.vocab_start,
            inverse_temperature=columns.inverse_temperature,
            statistics=out.data_ptr(),
            stream=_stream(),
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
    token_ids = token_ids.contiguous()
    rows = {
        "maximum": _row(softmax.maximum),
        "log_sum": _row(softmax.log_sum),
        "entropy": _row(softmax.entropy),
        "grad_logprob": _row(grad_logprob),
        "grad_entropy": _row(grad_entropy),
    }
    with torch.cuda.device(logits.device):
        _kernel("cuda_logprob_gradient", logits)(
            **_rows(logits, columns.num_columns),
            **_ids(token_ids),
            vocab_start=columns.vocab_start,
            inverse_temperature=columns.inverse_temperature,
            **{name: _address(row) for name, row in rows.items()},
            out=out.data_ptr(),
            out_stride=out.stride(0),
            num_out_columns=out.shape[1],
            stream=_stream(),
        )


def grpo_rows(logprob: Tensor, entropy: Tensor, *, tokens: TokenInputs, settings: TokenLossSettings) -> Tensor:
    """See `Backend.grpo_rows`."""
    out = torch.empty(len(ROW_OUTPUTS), logprob.shape[0], dtype=torch.float32, device=logprob.device)
    rows = {"logprob": _row(logprob), "entropy": _row(entropy), **_named(tokens)}
    with torch.cuda.device(logprob.device):
        _module().cuda_grpo_rows(
            **{name: _address(row) for name, row in rows.items()},
            num_rows=logprob.shape[0],
            settings=native_settings(settings, with_reference=tokens.reference_logprobs is not None),
            out=out.data_ptr(),
            stream=_stream(),
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
) -> Tensor | None:
    """See `SinglePassBackend.grpo_single_pass`. On sm_90 and later, for rows of up to 800 KiB that are aligned."""
    out = torch.empty(len(SINGLE_PASS_OUTPUTS), logits.shape[0], dtype=torch.float32, device=logits.device)
    token_ids = token_ids.contiguous()
    rows = _named(tokens)
    with torch.cuda.device(logits.device):
        has_run = _kernel("cuda_grpo_single_pass", logits)(
            **_rows(logits, columns.num_columns),
            **_ids(token_ids),
            vocab_start=columns.vocab_start,
            inverse_temperature=columns.inverse_temperature,
            **{name: _address(row) for name, row in rows.items()},
            settings=native_settings(settings, with_reference=tokens.reference_logprobs is not None),
            factor=factor,
            gradient=_address(gradient),
            gradient_stride=0 if gradient is None else gradient.stride(0),
            num_gradient_columns=0 if gradient is None else gradient.shape[1],
            out=out.data_ptr(),
            stream=_stream(),
        )
    return out if has_run else None


def _module() -> Any:
    module = native_module()
    assert module is not None
    return module


def _kernel(name: str, logits: Tensor) -> Any:
    return getattr(_module(), f"{name}_{_SUFFIX[logits.dtype]}")


def _rows(logits: Tensor, num_columns: int) -> dict[str, int]:
    return {
        "logits": logits.data_ptr(),
        "num_rows": logits.shape[0],
        "num_columns": num_columns,
        "row_stride": logits.stride(0),
    }


def _named(tokens: TokenInputs) -> dict[str, Tensor | None]:
    """As the kernels call and read them."""
    return {
        "old_logprobs": _row(tokens.old_logprobs),
        "rollout_logprobs": _row(tokens.rollout_logprobs),
        "reference_logprobs": _row(tokens.reference_logprobs),
        "advantages": _row(tokens.advantages),
        "shares": _row(tokens.shares),
    }


def _ids(token_ids: Tensor) -> dict[str, int | bool]:
    return {"token_ids": token_ids.data_ptr(), "ids_are_64_bit": token_ids.dtype == torch.int64}


def _row(tensor: Tensor | None) -> Tensor | None:
    """As the kernels read it."""
    return None if tensor is None else tensor.to(torch.float32).contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)
