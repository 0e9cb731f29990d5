"""The Hugging Face tensors of a decoder, by name and size, as published checkpoints hold them. Torch-free."""

from __future__ import annotations

from xrl.models.shape import ModelShape

Sizes = dict[str, tuple[int, ...]]

EMBEDDINGS, FINAL = "embeddings", "final"


def expected_tensors(shape: ModelShape) -> dict[str, Sizes]:
    """Every tensor of a model: part -> name -> size. The parts are "embeddings", "layers.0", ..., "final"."""
    hidden = shape.hidden_size
    parts: dict[str, Sizes] = {EMBEDDINGS: {"model.embed_tokens.weight": (shape.vocab_size, hidden)}}
    for index in range(shape.num_layers):
        layer = _layer(shape, index)
        parts[f"layers.{index}"] = {f"model.layers.{index}.{name}": size for name, size in layer.items()}
    parts[FINAL] = {"model.norm.weight": (hidden,)}
    if not shape.tied_embeddings:
        parts[FINAL]["lm_head.weight"] = (shape.vocab_size, hidden)
    return parts


def _layer(shape: ModelShape, index: int) -> Sizes:
    attention = _attention(shape) if shape.latent is None else _latent_attention(shape)
    return {
        "input_layernorm.weight": (shape.hidden_size,),
        **{f"self_attn.{name}": size for name, size in attention.items()},
        "post_attention_layernorm.weight": (shape.hidden_size,),
        **(_experts(shape) if shape.has_experts(index) else _dense_mlp(shape)),
    }


def _attention(shape: ModelShape) -> Sizes:
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    sizes: Sizes = {
        "q_proj.weight": (queries, shape.hidden_size),
        "k_proj.weight": (keys, shape.hidden_size),
        "v_proj.weight": (keys, shape.hidden_size),
        "o_proj.weight": (shape.hidden_size, queries),
    }
    if shape.qkv_bias:
        sizes |= {"q_proj.bias": (queries,), "k_proj.bias": (keys,), "v_proj.bias": (keys,)}
    if shape.out_bias:
        sizes |= {"o_proj.bias": (shape.hidden_size,)}
    if shape.qk_norm:
        sizes |= {"q_norm.weight": (shape.head_dim,), "k_norm.weight": (shape.head_dim,)}
    return sizes


def _latent_attention(shape: ModelShape) -> Sizes:
    latent = shape.latent
    assert latent is not None
    queries = shape.num_heads * shape.head_dim
    sizes: Sizes = {"q_proj.weight": (queries, shape.hidden_size)}
    if latent.q_lora_rank is not None:
        sizes = {
            "q_a_proj.weight": (latent.q_lora_rank, shape.hidden_size),
            "q_a_layernorm.weight": (latent.q_lora_rank,),
            "q_b_proj.weight": (queries, latent.q_lora_rank),
        }
    keys_and_values = shape.num_heads * (latent.qk_nope_head_dim + latent.v_head_dim)
    return {
        **sizes,
        "kv_a_proj_with_mqa.weight": (latent.kv_lora_rank + latent.qk_rope_head_dim, shape.hidden_size),
        "kv_a_layernorm.weight": (latent.kv_lora_rank,),
        "kv_b_proj.weight": (keys_and_values, latent.kv_lora_rank),
        "o_proj.weight": (shape.hidden_size, shape.num_heads * latent.v_head_dim),
    }


def _experts(shape: ModelShape) -> Sizes:
    experts = shape.experts
    assert experts is not None
    sizes: Sizes = {"mlp.gate.weight": (experts.num_experts, shape.hidden_size)}
    if experts.score_bias:
        sizes["mlp.gate.e_score_correction_bias"] = (experts.num_experts,)
    for expert in range(experts.num_experts):
        sizes |= _mlp(f"mlp.experts.{expert}", shape, experts.ffn_hidden_size)
    if experts.shared_ffn_hidden_size:
        sizes |= _mlp("mlp.shared_experts", shape, experts.shared_ffn_hidden_size)
    return sizes


def _dense_mlp(shape: ModelShape) -> Sizes:
    return _mlp("mlp", shape, shape.ffn_hidden_size, bias=shape.mlp_bias)


def _mlp(prefix: str, shape: ModelShape, ffn: int, *, bias: bool = False) -> Sizes:
    hidden = shape.hidden_size
    sizes: Sizes = {
        f"{prefix}.gate_proj.weight": (ffn, hidden),
        f"{prefix}.up_proj.weight": (ffn, hidden),
        f"{prefix}.down_proj.weight": (hidden, ffn),
    }
    if bias:
        sizes |= {
            f"{prefix}.gate_proj.bias": (ffn,),
            f"{prefix}.up_proj.bias": (ffn,),
            f"{prefix}.down_proj.bias": (hidden,),
        }
    return sizes
