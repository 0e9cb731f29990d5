"""From the QKV product to the attention's output, differentiable: QK norm, rotary embedding, attention over a pack.

Nothing but the product and the output is kept for the backward pass: normalised and rotated heads and scores are
computed again (arXiv:2307.08691 does so for the scores).

Shapes: T tokens of the pack; n query heads and g key/value heads of size d, r = n / g; N sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from xrl.kernels.arguments import (
    address,
    check_count,
    check_floats,
    check_index,
    check_instance,
    check_no_gradient,
    check_number,
    check_tensor,
)
from xrl.kernels.layers.layer_ops import reference_rms_norm, reference_rotary
from xrl.kernels.native import native_module
from xrl.kernels.threads import num_threads

_SUFFIX = {torch.float32: "f32", torch.bfloat16: "bf16"}
# A head must fill whole vectors of every instruction set.
HEAD_DIM_MULTIPLE = 16


@dataclass(frozen=True, kw_only=True)
class PackedSequences:
    """Where the sequences of a pack stand. A sequence may continue another one, its prompt, which continues none.

    Token i of sequence s is token starts[s] + i * step. Tokens that belong to no sequence all stand at the end.
    """

    starts: Tensor  # [N] int32
    lengths: Tensor  # [N] int32, at least 1
    parents: Tensor  # [N] int32 the sequence it continues, or -1
    num_tokens: int  # of all sequences together
    step: int = 1  # sequences side by side in memory (padded rows of shape [S, B]) have step B

    def check(self, num_rows: int) -> None:
        """Raise unless shapes and types are as said, for a pack of so many rows. The kernels check the values.

        Raises:
            ValueError: shapes or types that do not fit together.
            TypeError: an argument is of another kind.
        """
        cpu = torch.device("cpu")
        check_index("starts", self.starts, (None,), device=cpu)
        check_index("lengths", self.lengths, self.starts.shape, device=cpu)
        check_index("parents", self.parents, self.starts.shape, device=cpu)
        check_count("num_tokens", self.num_tokens, lowest=0)
        check_count("step", self.step)
        if self.num_tokens > num_rows:
            raise ValueError(f"a row for each of the {self.num_tokens} tokens of sequences is needed, got {num_rows}")

    def check_values(self) -> None:
        """Raise ValueError unless each token belongs to one sequence, as csrc/index_checks.h does."""
        lengths, parents = self.lengths.tolist(), self.parents.tolist()
        if min(lengths, default=1) < 1:
            raise ValueError(f"lengths must be >= 1, got {lengths}")
        if sum(lengths) != self.num_tokens:  # before room is made for so many
            raise ValueError(f"lengths must add up to num_tokens, {self.num_tokens}, got {sum(lengths)}")
        if not all(parent == -1 or (0 <= parent < len(parents) and parents[parent] == -1) for parent in parents):
            raise ValueError(f"parents must be -1 or a sequence that continues none, got {parents}")
        tokens = torch.cat([torch.empty(0, dtype=torch.int64), *self.indices()]).sort().values
        if not torch.equal(tokens, torch.arange(self.num_tokens)):
            raise ValueError(f"starts and lengths must give each of {self.num_tokens} tokens to one sequence")

    def addresses(self) -> tuple[int, ...]:
        """The sequences as the kernels take them: see SequencesTuple in csrc/arguments.h."""
        return address(self.starts), address(self.lengths), address(self.parents), len(self.starts), self.step

    def indices(self) -> list[Tensor]:
        """Token numbers of each sequence."""
        return [
            torch.arange(length) * self.step + start
            for start, length in zip(self.starts.tolist(), self.lengths.tolist(), strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class HeadSettings:
    """What happens to query and key heads before they meet."""

    cos: Tensor  # [T, d] contiguous
    sin: Tensor  # [T, d]
    q_weight: Tensor | None  # [d] of the QK norm; None: heads are not normalised
    k_weight: Tensor | None  # [d]
    eps: float
    scale: float  # of the scores


def can_run(*, dtype: torch.dtype, device: torch.device, head_dim: int) -> bool:
    """Whether `self_attention` has kernels for such heads; `reference_self_attention` is a specification, slow."""
    return not why_not_attention(dtype=dtype, device=device, head_dim=head_dim)


def why_not_attention(*, dtype: torch.dtype, device: torch.device, head_dim: int) -> str:
    """Why there are no kernels for such heads, in words; empty where there are."""
    if device.type != "cpu":
        return f"its kernels are for the CPU, not for {device.type}"
    if dtype not in _SUFFIX:
        return f"it takes float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    if head_dim % HEAD_DIM_MULTIPLE:
        return f"heads of {head_dim} are no multiple of {HEAD_DIM_MULTIPLE}"
    return "" if native_module() is not None else "xrl._C is not built"


def self_attention(mixed: Tensor, sequences: PackedSequences, settings: HeadSettings, *, num_kv_heads: int) -> Tensor:
    """Causal attention of every sequence over its prompt and itself; differentiable in `mixed` and the norms' weights.

    Args:
        mixed: [T, g * (r + 2) * d] for each token and KV head: r query heads, key, value, as megatron-core lays it out.

    Returns:
        [T, n * d]; zeros for tokens of no sequence

    Raises:
        ValueError: shapes, types or devices that do not fit together, or sequences that do not share out the tokens.
        TypeError: an argument is of another kind.
    """
    _check(mixed, sequences, settings, num_kv_heads)
    if not can_run(dtype=mixed.dtype, device=mixed.device, head_dim=settings.cos.shape[1]) or mixed.numel() == 0:
        sequences.check_values()
        return reference_self_attention(mixed, sequences, settings, num_kv_heads=num_kv_heads)
    out: Tensor = _SelfAttention.apply(mixed, settings.q_weight, settings.k_weight, sequences, settings, num_kv_heads)
    return out


def _check(mixed: Tensor, sequences: PackedSequences, settings: HeadSettings, num_kv_heads: int) -> None:
    check_floats("mixed", mixed, (None, None))
    check_instance("sequences", sequences, PackedSequences)
    check_instance("settings", settings, HeadSettings)
    check_count("num_kv_heads", num_kv_heads)
    num_rows, width = mixed.shape
    check_tensor("cos", settings.cos, (num_rows, None), like=mixed)
    check_tensor("sin", settings.sin, settings.cos.shape, like=mixed)
    for name, table in (("cos", settings.cos), ("sin", settings.sin)):
        if not table.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {list(table.stride())}")
    dim = settings.cos.shape[1]
    if dim < 2 or dim % 2:
        raise ValueError(f"cos must be [T, an even head size], got {list(settings.cos.shape)}")
    if width % (num_kv_heads * dim) or width < 3 * num_kv_heads * dim:
        raise ValueError(
            f"mixed must be [T, g * (r + 2) * d] with g = {num_kv_heads} KV heads of size d = {dim}, "
            f"got {list(mixed.shape)}"
        )
    check_head_norms(settings.q_weight, settings.k_weight, (dim,), like=mixed, names=("q_weight", "k_weight"))
    check_number("eps", settings.eps, lowest=0.0)
    check_number("scale", settings.scale)
    check_no_gradient("self_attention", cos=settings.cos, sin=settings.sin)
    sequences.check(num_rows)


def check_head_norms(
    q_norm: Tensor | None, k_norm: Tensor | None, shape: tuple[int], *, like: Tensor, names: tuple[str, str]
) -> None:
    """Raise unless both norms are there, of this shape, or none of them."""
    if (q_norm is None) != (k_norm is None):
        raise ValueError(f"{names[0]} and {names[1]} are needed together or not at all")
    for name, norm in zip(names, (q_norm, k_norm), strict=True):
        if norm is not None:
            check_tensor(name, norm, shape, like=like)


def reference_self_attention(
    mixed: Tensor, sequences: PackedSequences, settings: HeadSettings, *, num_kv_heads: int
) -> Tensor:
    """The specification of `self_attention`."""
    dim = settings.cos.shape[-1]
    heads = mixed.view(len(mixed), num_kv_heads, -1, dim)
    repeats = heads.shape[2] - 2
    query, key, value = heads[:, :, :repeats].flatten(1, 2), heads[:, :, -2], heads[:, :, -1]
    if settings.q_weight is not None and settings.k_weight is not None:
        query = reference_rms_norm(query, settings.q_weight, settings.eps)
        key = reference_rms_norm(key, settings.k_weight, settings.eps)
    query, key = (reference_rotary(x, settings.cos, settings.sin) for x in (query, key))
    indices = sequences.indices()
    out = torch.zeros_like(query)
    for own, parent in zip(indices, sequences.parents.tolist(), strict=True):
        seen = own if parent < 0 else torch.cat([indices[parent], own])
        k, v = (x[seen].repeat_interleave(repeats, dim=1) for x in (key, value))
        scores = torch.einsum("qnd,knd->nqk", query[own], k) * settings.scale
        hidden = torch.ones(len(own), len(seen), dtype=torch.bool).triu(len(seen) - len(own) + 1)
        out[own] = torch.einsum("nqk,knd->qnd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)
    return out.flatten(1)


class _SelfAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mixed: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        sequences: PackedSequences,
        settings: HeadSettings,
        num_kv_heads: int,
    ) -> Tensor:
        call = _Call(mixed.contiguous(), sequences, settings, num_kv_heads)
        query, key = call.rotated_heads()
        out = torch.empty(len(mixed), call.num_heads * call.dim, dtype=mixed.dtype)
        log_sums = torch.empty(call.num_heads, sequences.num_tokens)
        call.kernel("packed_attention_forward")(
            query=address(query),
            key=address(key),
            mixed=address(call.mixed),
            shape=call.shape,
            scale=settings.scale,
            sequences=call.sequences,
            out=address(out),
            log_sums=address(log_sums),
            num_threads=call.num_threads,
        )
        _clear_behind(out, sequences.num_tokens)
        ctx.save_for_backward(call.mixed, out, log_sums)
        ctx.arguments = sequences, settings, num_kv_heads
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        mixed, out, log_sums = ctx.saved_tensors
        sequences, settings, num_kv_heads = ctx.arguments
        call = _Call(mixed, sequences, settings, num_kv_heads)
        query, key = call.rotated_heads()
        grad_out = grads[0].contiguous()
        grad_query, grad_key, grad_mixed = torch.empty_like(query), torch.empty_like(key), torch.empty_like(mixed)
        call.kernel("packed_attention_backward")(
            query=address(query),
            key=address(key),
            mixed=address(mixed),
            out=address(out),
            log_sums=address(log_sums),
            grad_out=address(grad_out),
            shape=call.shape,
            scale=settings.scale,
            sequences=call.sequences,
            grad_query=address(grad_query),
            grad_key=address(grad_key),
            grad_mixed=address(grad_mixed),
            num_threads=call.num_threads,
        )
        grad_weights = torch.zeros(call.num_threads, 2, call.dim)
        call.kernel("qkv_rope_backward")(
            mixed=address(mixed),
            grad_query=address(grad_query),
            grad_key=address(grad_key),
            shape=call.shape,
            rope=call.rope,
            grad_mixed=address(grad_mixed),
            grad_weights=address(grad_weights),
            num_threads=call.num_threads,
        )
        _clear_behind(grad_mixed, sequences.num_tokens)
        if settings.q_weight is None:
            return grad_mixed, None, None, None, None, None
        grad_q_weight, grad_k_weight = grad_weights.sum(0).to(settings.q_weight.dtype)
        return grad_mixed, grad_q_weight, grad_k_weight, None, None, None


class _Call:
    """The arguments that the kernels have in common."""

    def __init__(self, mixed: Tensor, sequences: PackedSequences, settings: HeadSettings, num_kv_heads: int) -> None:
        self.mixed = mixed
        self.dim = settings.cos.shape[-1]
        repeats = mixed.shape[-1] // (num_kv_heads * self.dim) - 2
        self.num_heads, self.num_kv_heads = num_kv_heads * repeats, num_kv_heads
        self.shape = (sequences.num_tokens, num_kv_heads, repeats, self.dim)
        weights = (settings.q_weight, settings.k_weight)
        # They are kept: copies must live until the kernels return.
        self.weights = [None if weight is None else weight.contiguous() for weight in weights]
        self.rope = (address(settings.cos), address(settings.sin), *map(address, self.weights), settings.eps)
        self.sequences = sequences.addresses()
        self.num_threads = num_threads()

    def kernel(self, name: str) -> Callable[..., None]:
        kernel: Callable[..., None] = getattr(native_module(), f"{name}_{_SUFFIX[self.mixed.dtype]}")
        return kernel

    def rotated_heads(self) -> tuple[Tensor, Tensor]:
        """Query [num_tokens, n, d] and key [num_tokens, g, d], normalised and rotated."""
        num_tokens = self.shape[0]
        query = self.mixed.new_empty(num_tokens, self.num_heads, self.dim)
        key = self.mixed.new_empty(num_tokens, self.num_kv_heads, self.dim)
        self.kernel("qkv_rope_forward")(
            mixed=address(self.mixed),
            shape=self.shape,
            rope=self.rope,
            query=address(query),
            key=address(key),
            num_threads=self.num_threads,
        )
        return query, key


def _clear_behind(x: Tensor, num_tokens: int) -> None:
    if num_tokens < len(x):
        x[num_tokens:] = 0
