"""Qwen2, Qwen2.5 and Qwen3 dense decoders: Megatron parameter names -> mappings."""

from __future__ import annotations

from xrl.models.shape import ModelShape
from xrl.weights.mapping import GateUp, Mapping, QueryKeyValue, Replicated, RowParallel, Vocabulary


def layer_table(shape: ModelShape, layer: int) -> dict[str, Mapping]:
    """Parameters of one decoder layer, by their Megatron name within the layer.

    transformer-engine keeps a norm inside the linear layer that follows it, so norms have two names.
    """
    prefix = f"model.layers.{layer}."
    attention = prefix + "self_attn."
    input_norm = Replicated(prefix + "input_layernorm.weight", shape.hidden_size)
    mlp_norm = Replicated(prefix + "post_attention_layernorm.weight", shape.hidden_size)
    table: dict[str, Mapping] = {
        "input_layernorm.weight": input_norm,
        "self_attention.linear_qkv.layer_norm_weight": input_norm,
        "self_attention.linear_qkv.weight": _qkv(shape, attention, "weight"),
        "self_attention.linear_proj.weight": RowParallel(attention + "o_proj.weight", shape.num_heads * shape.head_dim),
        "pre_mlp_layernorm.weight": mlp_norm,
        "mlp.linear_fc1.layer_norm_weight": mlp_norm,
        "mlp.linear_fc1.weight": GateUp(
            prefix + "mlp.gate_proj.weight", prefix + "mlp.up_proj.weight", shape.ffn_hidden_size
        ),
        "mlp.linear_fc2.weight": RowParallel(prefix + "mlp.down_proj.weight", shape.ffn_hidden_size),
    }
    if shape.qkv_bias:
        table["self_attention.linear_qkv.bias"] = _qkv(shape, attention, "bias")
    if shape.qk_norm:
        table["self_attention.q_layernorm.weight"] = Replicated(attention + "q_norm.weight", shape.head_dim)
        table["self_attention.k_layernorm.weight"] = Replicated(attention + "k_norm.weight", shape.head_dim)
    return table


def outer_table(shape: ModelShape) -> dict[str, Mapping]:
    """Parameters outside the decoder layers, by their Megatron name.

    A tied head is the embedding under a second name; it exists as a parameter on the last pipeline stage only.
    """
    head = "model.embed_tokens.weight" if shape.tied_embeddings else "lm_head.weight"
    return {
        "embedding.word_embeddings.weight": Vocabulary("model.embed_tokens.weight", shape.vocab_size),
        "decoder.final_layernorm.weight": Replicated("model.norm.weight", shape.hidden_size),
        "output_layer.weight": Vocabulary(head, shape.vocab_size),
    }


def _qkv(shape: ModelShape, attention: str, kind: str) -> QueryKeyValue:
    return QueryKeyValue(
        query=f"{attention}q_proj.{kind}",
        key=f"{attention}k_proj.{kind}",
        value=f"{attention}v_proj.{kind}",
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
    )
