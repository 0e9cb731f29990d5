"""What a decoder of the supported families is made of, read from config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xrl.config.json_file import read_json_object
from xrl.models.families import FAMILIES, Family, architecture_of
from xrl.models.parts import ExpertShape, LatentAttention, RopeScaling

__all__ = [
    "ExpertShape",
    "LatentAttention",
    "ModelShape",
    "RopeScaling",
    "model_shape",
    "read_model_shape",
    "rope_settings",
    "with_defaults",
]

# Null says something else here than leaving the key out does.
_NULL_IS_A_VALUE = ("num_key_value_heads", "head_dim", "q_lora_rank", "sliding_window")


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
    max_positions: int  # tokens of a sequence that all see each other
    norm_eps: float
    rope_base: float
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    out_bias: bool = False  # of the projection after attention
    mlp_bias: bool = False  # of all three projections
    rope_scaling: RopeScaling | None = None
    experts: ExpertShape | None = None  # None: every MLP is dense
    latent: LatentAttention | None = None  # None: grouped-query attention

    def has_experts(self, layer: int) -> bool:
        """Whether a mixture of experts stands in place of the MLP of a layer, counted from 0."""
        return self.experts is not None and layer >= self.experts.first_dense_layers


def read_model_shape(model_dir: Path) -> ModelShape:
    """The shape of the Hugging Face checkpoint in `model_dir`."""
    return model_shape(read_json_object(model_dir / "config.json"))


def model_shape(config: Mapping[str, Any]) -> ModelShape:
    """The shape a Hugging Face `config.json` describes; `xrl.models.checks` checks that we compute what it says.

    Raises:
        KeyError: the architecture, or a size without a default.
    """
    architecture, family = _family(config)
    config = with_defaults(config)
    rope = rope_settings(config)

    def is_on(switch: bool | str) -> bool:
        return bool(config.get(switch)) if isinstance(switch, str) else switch

    latent = family.latent(config) if family.latent else None
    return ModelShape(
        architecture=architecture,
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"] if latent is None else latent.qk_nope_head_dim + latent.qk_rope_head_dim,
        vocab_size=config["vocab_size"],
        max_positions=_max_positions(config, family),
        norm_eps=config["rms_norm_eps"],
        rope_base=float(rope["rope_theta"]),
        tied_embeddings=bool(config.get("tie_word_embeddings")),
        qkv_bias=is_on(family.qkv_bias),
        qk_norm=family.qk_norm,
        out_bias=is_on(family.out_bias),
        mlp_bias=is_on(family.mlp_bias),
        rope_scaling=_rope_scaling(rope) if rope["rope_type"] == "llama3" else None,
        experts=family.experts(config) if family.experts else None,
        latent=latent,
    )


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with each key under its one name, and the family's defaults for what is left out or null."""
    _, family = _family(config)
    given = {family.aliases.get(key, key): value for key, value in config.items()}
    filled = {**family.defaults, **{k: v for k, v in given.items() if v is not None or k in _NULL_IS_A_VALUE}}
    if filled.get("num_key_value_heads") is None:
        filled["num_key_value_heads"] = filled["num_attention_heads"]
    if filled.get("head_dim") is None:
        filled["head_dim"] = filled["hidden_size"] // filled["num_attention_heads"]
    return filled


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings, from either spelling: `rope_parameters` (transformers 5) or `rope_scaling` beside
    `rope_theta`."""
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    old_name = rope.pop("type", None)
    rope["rope_type"] = rope.get("rope_type") or old_name or "default"
    rope["rope_theta"] = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    if rope["rope_type"] == "llama3" and rope.get("original_max_position_embeddings") is None:
        rope["original_max_position_embeddings"] = config["max_position_embeddings"]
    return rope


def _family(config: Mapping[str, Any]) -> tuple[str, Family]:
    architecture = architecture_of(config)
    return str(architecture), FAMILIES[str(architecture)]


def _max_positions(config: Mapping[str, Any], family: Family) -> int:
    """Sequences within a sliding window do not notice it; longer ones are not for us."""
    window = config.get("sliding_window") if "sliding_window" in family.defaults else None
    positions: int = config["max_position_embeddings"]
    return positions if window is None else min(positions, window)


def _rope_scaling(rope: Mapping[str, Any]) -> RopeScaling:
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_positions=rope["original_max_position_embeddings"],
    )
