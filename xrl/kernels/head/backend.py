"""Which code computes an operation: plain PyTorch, the compiled kernels, or Triton.

A backend supplies three primitives without communication, autograd or checks; the public operations beside them add
those, so that every backend means the same. Shapes: R rows, V columns of this rank's shard of the vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from xrl.kernels import triton
from xrl.kernels.head import native_cuda
from xrl.kernels.native import native_module
from xrl.kernels.threads import num_threads

if TYPE_CHECKING:
    from xrl.algorithms.loss_settings import TokenLossSettings
    from xrl.kernels.head.token_inputs import TokenInputs
    from xrl.kernels.shards import ShardColumns, Softmax

BackendName = Literal["auto", "reference", "native", "triton"]

# What the compiled kernels and Triton take; other types go to plain PyTorch.
FAST_DTYPES = (torch.float32, torch.bfloat16)


class Backend(Protocol):
    """The primitives. Logits are [R, V], fp32 or bf16, with adjacent columns; everything else is fp32."""

    def statistics(self, logits: Tensor, token_ids: Tensor, columns: ShardColumns) -> Tensor:
        """[4, R]: what this shard adds to each row's softmax, with s = (logit - maximum) * inverse_temperature.

        maximum of the logits (-inf where there is none), sum of exp(s), sum of exp(s) * s, and s of the chosen token
        (0 where another shard holds it). Columns from
        `num_columns` on are padding.
        """
        ...

    def gradient(
        self,
        logits: Tensor,
        token_ids: Tensor,
        out: Tensor,
        *,
        columns: ShardColumns,
        softmax: Softmax,
        grad_logprob: Tensor,
        grad_entropy: Tensor | None,
    ) -> None:
        """Write the gradient of the logits into `out` [R, V], which may be the logits themselves.

        out_v = (grad_logprob * (1[v is the token] - p_v) - grad_entropy * p_v * (log p_v + entropy)) / temperature

        Rows whose gradients are both 0 get zeros, whatever their logits; so do padded columns.
        """
        ...

    def grpo_rows(
        self, logprob: Tensor, entropy: Tensor, *, tokens: TokenInputs, settings: TokenLossSettings
    ) -> Tensor:
        """[ROW_OUTPUTS, R]: the GRPO loss of each token and its gradient, see `grpo_rows.ROW_OUTPUTS`."""
        ...


@runtime_checkable
class SinglePassBackend(Backend, Protocol):
    """A backend that also reads a row once for its loss and gradient: optional, for a vocabulary on one rank."""

    def grpo_single_pass(
        self,
        logits: Tensor,
        token_ids: Tensor,
        gradient: Tensor | None,
        *,
        columns: ShardColumns,
        tokens: TokenInputs,
        settings: TokenLossSettings,
        factor: float,
    ) -> Tensor | None:
        """[SINGLE_PASS_OUTPUTS, R]: log-prob, entropy, then `grpo_rows`; all 0 in masked rows, which are not read.
        None, with nothing done, where these rows or this device do not allow it.

        The gradient of the logits, times `factor`, goes to `gradient` [R, V], which may be the logits; None: nowhere.
        A token that is not in this shard has log-prob NaN.
        """
        ...


def choose_backend(name: BackendName, *, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend for tensors of this kind; `auto` takes the fastest there is.

    Raises:
        ValueError: the name is unknown, or that backend cannot run here; the sentence says why.
    """
    return _load(choose_backend_name(name, device=device, dtype=dtype), device)


def choose_backend_name(name: BackendName, *, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend that `choose_backend` takes."""
    if name not in get_args(BackendName):
        raise ValueError(f"backend {name!r} is unknown, known are: {', '.join(get_args(BackendName))}")
    if name == "auto":
        name = default_backend()
    if name == "reference" or (name == "auto" and dtype not in FAST_DTYPES):
        return "reference"
    if name == "auto":
        # Triton on a CPU is an interpreter: for tests only, never chosen.
        names = ("native", "triton") if device.type == "cuda" else ("native",)
        return next((each for each in names if not why_not(each, device)), "reference")
    reason = why_not(name, device)
    if reason:
        raise ValueError(f"backend {name!r} cannot run on {device.type}: {reason}")
    if dtype not in FAST_DTYPES:
        raise ValueError(f"backend {name!r} takes float32 and bfloat16, got {dtype}")
    return name


def default_backend() -> BackendName:
    """What `auto` stands for: XRL_KERNEL_BACKEND where it is set."""
    name = os.environ.get("XRL_KERNEL_BACKEND", "auto")
    if name not in get_args(BackendName):
        raise ValueError(f"XRL_KERNEL_BACKEND={name} is unknown, known are: {', '.join(get_args(BackendName))}")
    return name  # type: ignore[return-value, unused-ignore]


def why_not(name: str, device: torch.device) -> str:
    """Why a backend cannot run on a device, in a sentence; empty where it can."""
    return _REASONS[name](device)


def _why_not_native(device: torch.device) -> str:
    module = native_module()
    if module is None:
        return "xrl._C is not built; `pip install -e .` builds it"
    if device.type == "cpu":
        return ""
    if device.type == "cuda":
        return native_cuda.why_not(module)
    return "xrl._C has kernels for CPU and CUDA"


def _why_not_triton(device: torch.device) -> str:
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton compiles for CUDA; on a CPU it runs in its interpreter, with TRITON_INTERPRET=1 set"
    available, reason = triton.available()
    return "" if available else reason


_REASONS: Mapping[str, Callable[[torch.device], str]] = MappingProxyType(
    {"reference": lambda _: "", "native": _why_not_native, "triton": _why_not_triton}
)


def _load(name: str, device: torch.device) -> Backend:
    # Modules are backends: they hold functions and no state. Imported when asked for, as triton may not be there.
    module = {
        "reference": "head.reference_backend",
        "triton": "triton.backend",
        "native": f"head.native_{device.type}",
    }[name]
    backend: Backend = import_module(f"xrl.kernels.{module}")
    return backend


def describe() -> str:
    """Which backend runs where on this machine, a line each."""
    lines = []
    for kind in ("cpu", "cuda"):
        device = torch.device(kind)
        if kind == "cuda" and not torch.cuda.is_available():
            lines.append("cuda: no device")
            continue
        chosen = choose_backend_name("auto", device=device, dtype=torch.bfloat16)
        module = native_module()
        detail = ""
        if chosen == "native" and module is not None and kind == "cpu":
            detail = f" (xrl._C with {module.cpu_isa()}, {num_threads()} threads)"
        lines.append(f"{kind}: {chosen}{detail}")
        for name in ("native", "triton"):
            reason = why_not(name, device)
            lines.append(f"  {name}: {reason or 'available'}")
        lines.append("  reference: available")
    return "\n".join(lines)
