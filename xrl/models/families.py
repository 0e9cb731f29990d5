"""The architectures xrl knows: what sets their decoders apart, and how their config.json spells it. Torch-free.

Defaults are those of transformers' config classes, which hold for keys that a config.json leaves out; importing
transformers would cost every start seconds, so they stand here, and a test compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from xrl.models.parts import ExpertShape, LatentAttention

Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Family:
    """What all models of an architecture have in common, and the keys of config.json that tell them apart."""

    config_class: str
    """transformers' class for such a config.json."""

    defaults: Config
    """What keys that are left out, or null, mean."""

    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other spelling of a key -> the one used here."""

    qk_norm: bool = False
    """Each head of queries and keys is normalised."""

    qkv_bias: bool | str = False
    """Biases of the query, key and value projections: always, never, or the key that says so."""

    out_bias: bool | str = False
    """The same for the projection after attention."""

    mlp_bias: bool | str = False
    """The same for the three projections of the MLP."""

    experts: Callable[[Config], ExpertShape] | None = None
    """Reads the mixture of experts; None: every MLP is dense."""

    latent: Callable[[Config], LatentAttention] | None = None
    """Reads the latent attention; None: grouped-query attention."""

    keys: frozenset[str] = frozenset()
    """Keys that decide the maths, besides those that every family has."""

    needed: Config = field(default_factory=dict)
    """Keys that are supported with this one value only."""


def _qwen3_experts(config: Config) -> ExpertShape:
    return ExpertShape(
        num_experts=config["num_experts"],
        experts_per_token=config["num_experts_per_tok"],
        ffn_hidden_size=config["moe_intermediate_size"],
        normalize_top_k=config["norm_topk_prob"],
    )


def _deepseek_experts(config: Config) -> ExpertShape:
    return ExpertShape(
        num_experts=config["n_routed_experts"],
        experts_per_token=config["num_experts_per_tok"],
        ffn_hidden_size=config["moe_intermediate_size"],
        normalize_top_k=config["norm_topk_prob"],
        shared_ffn_hidden_size=config["n_shared_experts"] * config["moe_intermediate_size"],
        first_dense_layers=config["first_k_dense_replace"],
        score_function="sigmoid",
        score_bias=True,
        num_groups=config["n_group"],
        groups_per_token=config["topk_group"],
        scaling_factor=float(config["routed_scaling_factor"]),
    )


def _deepseek_latent(config: Config) -> LatentAttention:
    return LatentAttention(
        q_lora_rank=config["q_lora_rank"],
        kv_lora_rank=config["kv_lora_rank"],
        qk_nope_head_dim=config["qk_nope_head_dim"],
        qk_rope_head_dim=config["qk_rope_head_dim"],
        v_head_dim=config["v_head_dim"],
    )


_NO_WINDOW = {"use_sliding_window": False}
_QWEN = {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6}

FAMILIES: dict[str, Family] = {
    "Qwen2ForCausalLM": Family(
        config_class="Qwen2Config",
        defaults={**_QWEN, "num_key_value_heads": 32},
        qkv_bias=True,
        needed=_NO_WINDOW,
    ),
    "Qwen3ForCausalLM": Family(
        config_class="Qwen3Config",
        defaults={**_QWEN, "num_key_value_heads": 32, "head_dim": 128},
        qk_norm=True,
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        needed=_NO_WINDOW,
    ),
    "Qwen3MoeForCausalLM": Family(
        config_class="Qwen3MoeConfig",
        defaults={
            **_QWEN,
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
        },
        aliases={"num_local_experts": "num_experts"},
        qk_norm=True,
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        experts=_qwen3_experts,
        keys=frozenset({"num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"}),
        # Dense layers among those with experts.
        needed={**_NO_WINDOW, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "LlamaForCausalLM": Family(
        config_class="LlamaConfig",
        defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    "MistralForCausalLM": Family(
        config_class="MistralConfig",
        defaults={
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-6,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
        keys=frozenset({"sliding_window"}),
    ),
    "InternLM3ForCausalLM": Family(
        config_class="InternLM3Config",
        defaults={
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 2,
            "head_dim": 128,
        },
        aliases={"qkv_bias": "attention_bias", "bias": "mlp_bias"},
        qkv_bias="attention_bias",
        out_bias="mlp_bias",
        mlp_bias="mlp_bias",
    ),
    "DeepseekV3ForCausalLM": Family(
        config_class="DeepseekV3Config",
        defaults={
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "num_key_value_heads": 128,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 2048,
            "norm_topk_prob": True,
            "first_k_dense_replace": 3,
            "n_group": 8,
            "topk_group": 4,
            "routed_scaling_factor": 2.5,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
        aliases={"num_local_experts": "n_routed_experts"},
        experts=_deepseek_experts,
        latent=_deepseek_latent,
        keys=frozenset({"q_lora_rank"}),
        needed={"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1, "rope_interleave": True},
    ),
}
