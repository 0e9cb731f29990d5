"""Which code computes a layer of the training pass, and why: the one table that answers it.

A way is a row: its name, and why it cannot serve a layer. The first row without an objection is taken, the fastest
first; the last serves everything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import torch

from xrl.kernels.layers.gated_mlp import is_packed_whole
from xrl.kernels.layers.self_attention import why_not_attention
from xrl.kernels.matmul import why_not_matmul

TRANSFORMER_ENGINE = "transformer-engine"
ONE_CALL = "one call (CPU fp32)"
ONE_BY_ONE = "operations one by one (CPU)"
PYTORCH = "operations one by one, attention by PyTorch"


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """What the choice depends on. The defaults are a dense layer on one tensor rank, of sizes that all ways take."""

    device: torch.device
    dtype: torch.dtype
    # --transformer-impl, "auto": on CUDA where the package is installed.
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    head_dim: int = 64
    mlp_bytes: int = 0  # of the MLP's weights on this rank, in fp32
    tensor_size: int = 1
    has_experts: bool = False
    has_latent_attention: bool = False
    has_output_bias: bool = False  # in attention or MLP


@dataclass(frozen=True, kw_only=True)
class LayerChoice:
    """The way that was taken, and what the ways before it were refused for."""

    name: str
    refused: tuple[tuple[str, str], ...]  # (way, why not)

    def __str__(self) -> str:
        """As in "operations one by one (CPU), not one call (CPU fp32) because it is bfloat16"."""
        return ", ".join([self.name, *(f"not {name} because {reason}" for name, reason in self.refused)])


def why_not_te(kind: LayerKind) -> str:
    """Why transformer-engine's layers are not taken; empty where they are."""
    if kind.has_latent_attention:
        return "latent attention is always our own"
    if kind.transformer_impl == "transformer_engine":
        return ""
    if kind.transformer_impl == "local":
        return "--transformer-impl local"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return "" if find_spec("transformer_engine") is not None else "it is not installed"


def why_not_dense(kind: LayerKind) -> str:
    """Why a layer does not consist of the modules that one call can take the place of; empty where it does."""
    if kind.has_experts:
        return "it has experts"
    if kind.has_latent_attention:
        return "its attention is latent"
    if kind.has_output_bias:
        return "its output projections have biases"
    return "" if kind.device.type == "cpu" else f"it is on {kind.device.type}"


def why_not_our_attention(kind: LayerKind) -> str:
    """Why our own attention does not run; empty where it does."""
    if kind.has_latent_attention:
        return "it is latent"
    return why_not_attention(dtype=kind.dtype, device=kind.device, head_dim=kind.head_dim)


def _why_not_one_call(kind: LayerKind) -> str:
    reason = why_not_dense(kind)
    if reason:
        return reason
    if kind.tensor_size > 1:
        return f"{kind.tensor_size} tensor ranks share it"
    if kind.dtype != torch.float32:
        return f"it is {str(kind.dtype).removeprefix('torch.')}"
    if not is_packed_whole(kind.mlp_bytes):
        return f"its MLP of {kind.mlp_bytes >> 20} MiB is too large to be packed at each call"
    return why_not_our_attention(kind) or why_not_matmul()


# The order is that in which they are asked. A new way is a row here and a test.
WAYS: tuple[tuple[str, Callable[[LayerKind], str]], ...] = (
    (TRANSFORMER_ENGINE, why_not_te),
    (ONE_CALL, _why_not_one_call),
    (ONE_BY_ONE, why_not_our_attention),
    (PYTORCH, lambda _: ""),
)


def choose_layer(kind: LayerKind) -> LayerChoice:
    """Which of the ways computes such a layer."""
    refused: list[tuple[str, str]] = []
    for name, why_not in WAYS:
        reason = why_not(kind)
        if not reason:
            return LayerChoice(name=name, refused=tuple(refused))
        refused.append((name, reason))
    raise AssertionError("the last way takes every layer")


def describe_layers() -> str:
    """The table for a dense layer as this machine would train it by default, a line each."""
    on_cuda = torch.cuda.is_available()
    kind = LayerKind(
        device=torch.device("cuda" if on_cuda else "cpu"), dtype=torch.bfloat16 if on_cuda else torch.float32
    )
    ways = [f"  {name}: {why_not(kind) or 'available'}" for name, why_not in WAYS]
    return "\n".join([f"layer of a dense model: {choose_layer(kind).name}", *ways])
