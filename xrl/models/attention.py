"""Causal attention on any device: rotary positions, grouped queries, packed sequences, shared prompts.

Shapes: T tokens of the micro-batch; n query heads and g key/value heads of this tensor rank, each of size d;
N sequences padded to Q positions; P positions of the prompts they continue.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from xrl.kernels.layers.layer_ops import rotary
from xrl.models.packed import AttentionInputs, Cluster, Rectangle


class PackedAttention(torch.nn.Module):
    """Fills megatron-core's core-attention slot; what it needs to know comes in as `AttentionInputs`.

    Rotary embedding is applied here (megatron-core is told position_embedding_type "none"), because
    megatron-core knows no sequence that starts at another position than 0.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: object,
    ) -> None:
        super().__init__()
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels or 1)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: AttentionInputs | None = None,
        **_: object,
    ) -> Tensor:
        """Rotate queries and keys, and attend.

        Args:
            query: packed [T, n, d]; padded [S, B, n, d]; not rotated yet.
            key, value: the same with g heads.
            packed_seq_params: positions, and the borders of packed sequences.

        Returns:
            packed [T, n * d]; padded [S, B, n * d]
        """
        inputs = packed_seq_params
        assert inputs is not None and inputs.cos is not None and inputs.sin is not None
        return self.attend(rotary(query, inputs.cos, inputs.sin), rotary(key, inputs.cos, inputs.sin), value, inputs)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, inputs: AttentionInputs) -> Tensor:
        """Attend with heads that are rotated already; those of values may have another size."""
        if inputs.clusters is None:
            out = self._causal(query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1))
            return out.transpose(0, 1).flatten(2)
        return self._packed(query, key, value, inputs.clusters).flatten(1)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, clusters: tuple[Cluster, ...]) -> Tensor:
        sizes = [
            rectangle.num_tokens
            for cluster in clusters
            for rectangle in (cluster.roots, cluster.branches)
            if rectangle is not None
        ]
        num_padding = len(query) - sum(sizes)
        sizes.append(num_padding)
        parts = zip(query.split(sizes), key.split(sizes), value.split(sizes), strict=True)
        outputs = []
        for cluster in clusters:
            q, k, v = (_pad(tensor, cluster.roots) for tensor in next(parts))
            outputs.append(_unpad(self._causal(q, k, v), cluster.roots))
            if cluster.branches is None or cluster.parents is None or cluster.mask is None:
                continue
            # An answer sees all of its prompt, computed once above, and itself causally.
            branch_q, branch_k, branch_v = (_pad(tensor, cluster.branches) for tensor in next(parts))
            branch_k = torch.cat([k.index_select(0, cluster.parents), branch_k], dim=1)
            branch_v = torch.cat([v.index_select(0, cluster.parents), branch_v], dim=1)
            outputs.append(_unpad(self._masked(branch_q, branch_k, branch_v, cluster.mask), cluster.branches))
        if num_padding:
            outputs.append(query.new_zeros(num_padding, query.shape[1], value.shape[2]))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _causal(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[N, Q, n, d]: padding stands behind every real token, so the causal mask alone hides it."""
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, scale=self.scale, enable_gqa=True
        )
        return out.transpose(1, 2)

    def _masked(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Queries [N, Q, n, d] over keys [N, P + Q, g, d] under an additive mask [N, 1, n / g * Q, P + Q]."""
        num_sequences, length, heads, dim = q.shape
        kv_heads, value_dim = k.shape[2], v.shape[3]
        repeat = heads // kv_heads
        # The query heads of one key head become further rows of it: no copy of keys and values is made.
        rows = q.view(num_sequences, length, kv_heads, repeat, dim).permute(0, 2, 3, 1, 4)
        out = F.scaled_dot_product_attention(
            rows.reshape(num_sequences, kv_heads, repeat * length, dim),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            scale=self.scale,
        )
        out = out.view(num_sequences, kv_heads, repeat, length, value_dim).permute(0, 3, 1, 2, 4)
        return out.reshape(num_sequences, length, heads, value_dim)


def _pad(x: Tensor, rectangle: Rectangle) -> Tensor:
    """[t, n, d] -> [N, Q, n, d]"""
    if rectangle.index is None:
        return x.reshape(*rectangle.shape, *x.shape[1:])
    padded: Tensor = _Pad.apply(x, rectangle.index, rectangle.inverse)
    return padded.view(*rectangle.shape, *x.shape[1:])


def _unpad(x: Tensor, rectangle: Rectangle) -> Tensor:
    """[N, Q, n, d] -> [t, n, d]"""
    flat = x.reshape(-1, *x.shape[2:])
    if rectangle.inverse is None:
        return flat
    unpadded: Tensor = _Unpad.apply(flat, rectangle.inverse)
    return unpadded


class _Pad(torch.autograd.Function):
    """Gather tokens to their slots. Each has one slot, so the backward is a gather too, not a scatter-add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0].index_select(0, inverse), None, None


class _Unpad(torch.autograd.Function):
    """Gather tokens from their slots; padding gets a zero gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.num_slots = x.shape[0]
        return x.index_select(0, inverse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (inverse,) = ctx.saved_tensors
        padded = grads[0].new_zeros(ctx.num_slots, *grads[0].shape[1:])
        return padded.index_copy_(0, inverse, grads[0]), None
