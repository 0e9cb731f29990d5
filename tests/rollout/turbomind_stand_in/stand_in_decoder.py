"""Weights and maths of the stand-in: a decoder, dense or of experts, read from TurboMind's layout of the weights.

V vocabulary, H hidden size, F size of the MLP, D head dimension, T tokens of a sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class Weights:
    """By TurboMind's names, in the order [inputs, outputs]."""

    def __init__(self, model: dict[str, Any], attention: dict[str, Any], dtype: torch.dtype) -> None:
        self.model, self.rope_base, self.dtype = model, attention["rope_param"]["base"], dtype
        self.num_layers: int = model["num_layer"]
        self.heads: tuple[int, int, int] = model["head_num"], model["kv_head_num"], model["size_per_head"]
        self.tensors: dict[str, Tensor] = {}
        self.allocate()

    def allocate(self) -> None:
        """Uninitialised, as memory of the device is."""
        hidden, vocab_size = self.model["hidden_units"], self.model["vocab_size"]
        queries, keys, head_dim = self.heads
        qkv_size = (queries + 2 * keys) * head_dim
        sizes: dict[str, tuple[int, ...]] = {
            "tok_embeddings.0.weight": (vocab_size, hidden),
            "output.0.weight": (hidden, vocab_size),
            "norm.weight": (hidden,),
        }
        for index in range(self.num_layers):
            layer: dict[str, tuple[int, ...]] = {
                "attention_norm.weight": (hidden,),
                "ffn_norm.weight": (hidden,),
                "attention.w_qkv.0.weight": (hidden, qkv_size),
                "attention.wo.0.weight": (queries * head_dim, hidden),
            }
            for mlp, ffn_size in self.mlps(index):
                layer |= {f"{mlp}.w{number}.0.weight": (hidden, ffn_size) for number in (1, 3)}
                layer[f"{mlp}.w2.0.weight"] = (ffn_size, hidden)
            if num_experts := self.num_experts(index):
                layer["moe_ffn.gate.weight"] = (hidden, num_experts)
            if self.model["attn_bias"]:
                layer |= {"attention.w_qkv.0.bias": (qkv_size,), "attention.wo.0.bias": (hidden,)}
            if self.model["qk_norm"]:
                layer |= {"attention.q_norm": (head_dim,), "attention.k_norm": (head_dim,)}
            sizes |= {f"layers.{index}.{name}": size for name, size in layer.items()}
        self.tensors = {name: torch.full(size, torch.nan, dtype=self.dtype) for name, size in sizes.items()}

    def num_experts(self, index: int) -> int:
        return self.model["expert_num"][index] if self.model["expert_num"] else 0

    def mlps(self, index: int) -> list[tuple[str, int]]:
        """Name and size of every MLP of a layer."""
        dense = [("feed_forward", self.model["inter_size"][index])] if self.model["inter_size"][index] else []
        size = self.model["expert_inter_size"]
        return dense + [(f"moe_ffn.experts.{expert}", size) for expert in range(self.num_experts(index))]

    def prepare(self) -> None:
        """Into what the kernels read: matrices packed, w1 and w3 joined, in the same memory where it fits."""
        for index in range(self.num_layers):
            packed = ["attention.w_qkv.0.weight", "attention.wo.0.weight"]
            for mlp, _ in self.mlps(index):
                gate, up = (self.tensors.pop(f"layers.{index}.{mlp}.{name}.0.weight", None) for name in ("w1", "w3"))
                if gate is not None and up is not None:
                    self.tensors[f"layers.{index}.{mlp}.w1w3.0.weight"] = torch.cat([gate, up], 1)
                packed.append(f"{mlp}.w1w3.0.weight")
            for name in packed:
                matrix = self.tensors[f"layers.{index}.{name}"]
                matrix.copy_(_pack(matrix))

    def get(self, name: str) -> Tensor:
        return self.tensors[name].float()

    def matrix(self, name: str) -> Tensor:
        """A packed one, as it was."""
        return _unpack(self.get(name))


def _pack(matrix: Tensor) -> Tensor:
    return matrix.roll(1, 0)


def _unpack(matrix: Tensor) -> Tensor:
    return matrix.roll(-1, 0)


def last_logits(weights: Weights, token_ids: Tensor) -> Tensor:
    """[V] after a whole sequence [T], in fp32."""
    eps = weights.model["norm_eps"]
    hidden = weights.get("tok_embeddings.0.weight")[token_ids]
    for index in range(weights.num_layers):
        layer = f"layers.{index}"
        hidden = hidden + _attention(weights, layer, _norm(hidden, weights.get(f"{layer}.attention_norm.weight"), eps))
        hidden = hidden + _feed_forward(weights, index, _norm(hidden, weights.get(f"{layer}.ffn_norm.weight"), eps))
    return _norm(hidden[-1], weights.get("norm.weight"), eps) @ weights.get("output.0.weight")


def _feed_forward(weights: Weights, index: int, hidden: Tensor) -> Tensor:
    layer = f"layers.{index}"
    outputs = []
    for mlp, _ in weights.mlps(index):
        gate, up = (hidden @ weights.matrix(f"{layer}.{mlp}.w1w3.0.weight")).chunk(2, -1)
        outputs.append((F.silu(gate) * up) @ weights.get(f"{layer}.{mlp}.w2.0.weight"))
    if not weights.num_experts(index):
        return outputs[0]
    shares, chosen = (
        (hidden @ weights.get(f"{layer}.moe_ffn.gate.weight")).softmax(-1).topk(weights.model["experts_per_token"])
    )
    if weights.model["norm_topk_prob"]:
        shares = shares / shares.sum(-1, keepdim=True)
    share_of_all = torch.zeros(len(hidden), len(outputs)).scatter(-1, chosen, shares)
    return (torch.stack(outputs, -1) * share_of_all[:, None]).sum(-1)


def _attention(weights: Weights, layer: str, hidden: Tensor) -> Tensor:
    queries, keys, head_dim = weights.heads
    qkv = hidden @ weights.matrix(f"{layer}.attention.w_qkv.0.weight")
    if weights.model["attn_bias"]:
        qkv = qkv + weights.get(f"{layer}.attention.w_qkv.0.bias")
    q, k, v = qkv.view(-1, queries + 2 * keys, head_dim).transpose(0, 1).split([queries, keys, keys])
    if weights.model["qk_norm"]:
        eps = weights.model["norm_eps"]
        q = _norm(q, weights.get(f"{layer}.attention.q_norm"), eps)
        k = _norm(k, weights.get(f"{layer}.attention.k_norm"), eps)
    q, k = _rotate(q, weights.rope_base), _rotate(k, weights.rope_base)
    out = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
    out = out.transpose(0, 1).reshape(-1, queries * head_dim) @ weights.matrix(f"{layer}.attention.wo.0.weight")
    return out + weights.get(f"{layer}.attention.wo.0.bias") if weights.model["attn_bias"] else out


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _rotate(x: Tensor, base: float) -> Tensor:
    """Rotary embedding of [heads, T, D] where the two halves of a pair are neighbours."""
    num_tokens, head_dim = x.shape[-2:]
    frequency = base ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    angle = (torch.arange(num_tokens).double()[:, None] * frequency).float()
    even, odd = x[..., ::2], x[..., 1::2]
    rotated = torch.stack([even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin()], -1)
    return rotated.flatten(-2)


def candidates(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, Tensor]:
    """Probabilities, likeliest first, and token ids of what is left after all filters."""
    probabilities, indices = (logits / temperature).softmax(-1).sort(descending=True)
    if top_k > 0:
        probabilities, indices = probabilities[:top_k], indices[:top_k]
    before = probabilities.cumsum(-1) - probabilities
    keep = ((before < top_p) | (top_p >= 1)) & (probabilities >= min_p * probabilities[0])
    keep[0] = True
    probabilities = probabilities[keep]
    return probabilities / probabilities.sum(), indices[keep]
