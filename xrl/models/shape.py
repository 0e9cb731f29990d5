"""What a decoder of the supported families is made of, read from config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The dimensions and switches that decide a decoder's maths; every size is of the whole model."""

    architecture: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope_base: float
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool


def read_model_shape(model_dir: Path) -> ModelShape:
    """The shape of the Hugging Face checkpoint in `model_dir`."""
    config = json.loads((model_dir / "config.json").read_text())
    return model_shape(config)


def model_shape(config: Mapping[str, Any]) -> ModelShape:
    """The shape a Hugging Face `config.json` describes.

    Defaults are those of transformers' Qwen2Config and Qwen3Config for keys that old files leave out.
    """
    architecture = config["architectures"][0]
    rope = config.get("rope_parameters") or {}
    return ModelShape(
        architecture=architecture,
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        vocab_size=config["vocab_size"],
        max_positions=config.get("max_position_embeddings") or 32768,
        norm_eps=config.get("rms_norm_eps") or 1e-6,
        rope_base=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        tied_embeddings=bool(config.get("tie_word_embeddings")),
        qkv_bias=architecture == "Qwen2ForCausalLM",
        qk_norm=architecture == "Qwen3ForCausalLM",
    )
