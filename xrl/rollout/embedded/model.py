"""The forward pass of a decoder over the paged KV cache: prefill of prompts, decode of one token a row.

Shapes: N tokens of a batch, H hidden size, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from xrl.kernels.decode.decode_attention import PagedContext, decode_attention
from xrl.kernels.decode.decode_layers import DecodeLayer, LayerStack, RopeTables, decode_layers
from xrl.kernels.decode.prefill_attention import prefill_attention
from xrl.kernels.decode.rms_norm import rms_norm
from xrl.kernels.decode.rope_cache import rope_cache
from xrl.models.rotary import rotary_frequencies, rotary_table
from xrl.models.shape import ModelShape
from xrl.rollout.embedded.cache import KVCache
from xrl.rollout.embedded.mlp import Experts
from xrl.rollout.embedded.weights import DecoderWeights


class Decoder:
    """Hidden states and logits from token ids, reading and filling a KV cache."""

    def __init__(self, shape: ModelShape, weights: DecoderWeights, max_positions: int) -> None:
        self.shape, self.weights = shape, weights
        cos, sin = rotary_table(torch.arange(max_positions), rotary_frequencies(shape))
        self.cos, self.sin = cos.to(weights.device), sin.to(weights.device)

    def prefill(
        self, tokens: Tensor, positions: Tensor, slots: Tensor, *, lengths: Sequence[int], cache: KVCache
    ) -> Tensor:
        """Run prompts, laid end to end, and store their keys and values.

        Args:
            tokens, positions, slots: [N] int32; tokens past sum(lengths) are padding (slot -1)
            lengths: tokens of each prompt

        Returns:
            [len(lengths), H] final hidden state of each prompt's last token
        """

        def attend(qkv: Tensor, layer: int) -> Tensor:
            return prefill_attention(qkv, lengths, num_heads=self.shape.num_heads)

        hidden = self._forward(tokens, positions, slots, cache, attend)
        last = torch.tensor(lengths, device=hidden.device).cumsum(0) - 1
        return hidden[last]

    def decode(
        self,
        tokens: Tensor,
        positions: Tensor,
        slots: Tensor,
        context: PagedContext,
        cache: KVCache,
        layers: LayerStack | None = None,
    ) -> Tensor:
        """Run one new token a row.

        Args:
            tokens, positions, slots: [N] int32; padding rows have slot -1
            layers: `dense_layers` with this cache

        Returns:
            [N, H] final hidden states
        """
        if layers is not None:
            x = F.embedding(tokens, self.weights.embedding)
            rope = RopeTables(positions=positions, cos=self.cos, sin=self.sin)
            x = decode_layers(x, layers, context, rope, slots=slots, eps=self.shape.norm_eps)
            return rms_norm(x, self.weights.final_norm, self.shape.norm_eps)

        def attend(qkv: Tensor, layer: int) -> Tensor:
            query = qkv[:, : self.shape.num_heads]
            return decode_attention(query, cache.keys[layer], cache.values[layer], context)

        return self._forward(tokens, positions, slots, cache, attend)

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, H] final hidden states -> [N, V] fp32"""
        assert self.weights.head is not None
        return self.weights.head(hidden).float()

    def dense_layers(self, cache: KVCache, known: LayerStack | None) -> LayerStack | None:
        """The layers with their part of the cache: `known` where it is still that. None where there are experts."""
        if known is not None and self._are_current(known, cache):
            return known
        layers = []
        for index in range(self.shape.num_layers):
            weights = self.weights.layers[index]
            if isinstance(weights.mlp, Experts):
                return None
            layers.append(
                DecodeLayer(
                    input_norm=weights.input_norm,
                    qkv=weights.qkv,
                    q_norm=weights.q_norm,
                    k_norm=weights.k_norm,
                    attention_out=weights.attention_out,
                    mlp_norm=weights.mlp_norm,
                    gate_up=weights.mlp.gate_up,
                    down=weights.mlp.down,
                    keys=cache.keys[index],
                    values=cache.values[index],
                )
            )
        return LayerStack(layers)

    def _are_current(self, known: LayerStack, cache: KVCache) -> bool:
        """Whether no layer has other weights or another cache by now: both come a whole layer at a time."""
        for index, layer in enumerate(known.layers):
            weights = self.weights.layers[index]
            if layer.input_norm is not weights.input_norm or layer.qkv is not weights.qkv:
                return False
            if layer.keys is not cache.keys[index] or layer.values is not cache.values[index]:
                return False
        return True

    def _forward(
        self, tokens: Tensor, positions: Tensor, slots: Tensor, cache: KVCache, attend: Callable[[Tensor, int], Tensor]
    ) -> Tensor:
        shape, weights, eps = self.shape, self.weights, self.shape.norm_eps
        x = F.embedding(tokens, weights.embedding)
        for index in range(shape.num_layers):
            layer = weights.layers[index]
            h = rms_norm(x, layer.input_norm, eps)
            qkv = layer.qkv(h).view(len(x), -1, shape.head_dim)
            keys, values = cache.keys[index], cache.values[index]
            rope_cache(qkv, self.cos, self.sin, positions, layer.q_norm, layer.k_norm, eps, keys, values, slots)
            x = layer.attention_out.plus(attend(qkv, index).flatten(1), x)
            h = rms_norm(x, layer.mlp_norm, eps)
            x = layer.mlp.plus(h, x)
        return rms_norm(x, weights.final_norm, eps)
