"""The architectures xrl knows: what sets their decoders apart, and how their config.json spells it. Torch-free.

Defaults are those of transformers' config classes, which hold for keys that a config.json leaves out; importing
transformers would cost every start seconds, so they stand here, and a test compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from xrl.models.parts import ExpertShape, LatentAttention

Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Family:
    """What all models of an architecture have in common, and the keys of config.json that tell them apart."""

    config_class: str
    """transformers' class for such a config.json."""

    model_type: str
    """What such a config.json calls it."""

    defaults: Config
    """Keys that decide the maths, besides those that every family has, and what it means to leave them out."""

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

    needed: Config = field(default_factory=dict)
    """Keys that are supported with this one value only."""

    equal: tuple[str, ...] = ()
    """Keys that are supported with equal values only."""

    harmless: frozenset[str] = frozenset()
    """Keys that change nothing in this family, given those that are needed."""

    @property
    def switches(self) -> frozenset[str]:
        """Keys that turn biases on."""
        return frozenset(key for key in (self.qkv_bias, self.out_bias, self.mlp_bias) if isinstance(key, str))

    @property
    def read(self) -> frozenset[str]:
        """The keys of config.json that the family reads, in any spelling."""
        return self.switches | self.defaults.keys() | self.aliases.keys()


def _qwen3_experts(config: Config) -> ExpertShape:
    return ExpertShape(
        num_experts=config["num_experts"],
        experts_per_token=config["num_experts_per_tok"],
        ffn_hidden_size=config["moe_intermediate_size"],
        normalize_top_k=config["norm_topk_prob"],
    )


def _qwen2_experts(config: Config) -> ExpertShape:
    return replace(
        _qwen3_experts(config),
        shared_ffn_hidden_size=config["shared_expert_intermediate_size"],
        shared_gate=True,
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


_QWEN: dict[str, Any] = {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6}
_NO_WINDOW = {"use_sliding_window": False}
# No dense layers among those with experts.
_ALL_EXPERTS = {"decoder_sparse_step": 1, "mlp_only_layers": []}
_WINDOW_SIZES = frozenset({"sliding_window", "max_window_layers"})

FAMILIES: dict[str, Family] = {
    "Qwen2ForCausalLM": Family(
        config_class="Qwen2Config",
        model_type="qwen2",
        defaults={**_QWEN, "num_key_value_heads": 32},
        qkv_bias=True,
        needed=_NO_WINDOW,
        harmless=_WINDOW_SIZES,
    ),
    "Qwen2MoeForCausalLM": Family(
        config_class="Qwen2MoeConfig",
        model_type="qwen2_moe",
        defaults={
            **_QWEN,
            "num_key_value_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "norm_topk_prob": False,
            "qkv_bias": True,
        },
        qkv_bias="qkv_bias",
        experts=_qwen2_experts,
        needed={**_NO_WINDOW, **_ALL_EXPERTS},
        harmless=_WINDOW_SIZES,
    ),
    "Qwen3ForCausalLM": Family(
        config_class="Qwen3Config",
        model_type="qwen3",
        defaults={**_QWEN, "num_key_value_heads": 32, "head_dim": 128},
        qk_norm=True,
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        needed=_NO_WINDOW,
        harmless=_WINDOW_SIZES,
    ),
    "Qwen3MoeForCausalLM": Family(
        config_class="Qwen3MoeConfig",
        model_type="qwen3_moe",
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
        needed={
            **_NO_WINDOW,
            **_ALL_EXPERTS,
            # Some write down what all of them have.
            "qkv_bias": False,
            "shared_expert_intermediate_size": 0,
            "use_qk_norm": True,
        },
        harmless=_WINDOW_SIZES,
    ),
    "LlamaForCausalLM": Family(
        config_class="LlamaConfig",
        model_type="llama",
        defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
        qkv_bias="attention_bias",
        out_bias="attention_bias",
        mlp_bias="mlp_bias",
    ),
    "MistralForCausalLM": Family(
        config_class="MistralConfig",
        model_type="mistral",
        defaults={
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-6,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
    ),
    "InternLM3ForCausalLM": Family(
        config_class="InternLM3Config",
        model_type="internlm3",
        defaults={
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 2,
            "head_dim": 128,
        },
        aliases={"qkv_bias": "attention_bias", "bias": "mlp_bias"},
        qkv_bias="attention_bias",
        # Which of the two switches the bias after attention, implementations do not agree on.
        out_bias="attention_bias",
        mlp_bias="mlp_bias",
        equal=("attention_bias", "mlp_bias"),
    ),
    "DeepseekV3ForCausalLM": Family(
        config_class="DeepseekV3Config",
        model_type="deepseek_v3",
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
        needed={
            "norm_topk_prob": True,
            "rope_interleave": True,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "moe_layer_freq": 1,
        },
        # Multi-token prediction heads are neither trained nor written: transformers leaves them out, too.
        harmless=frozenset({"num_nextn_predict_layers", "num_mtp_layers", "qk_head_dim", "head_dim"}),
    ),
}


def architecture_of(config: Config) -> str | None:
    """The key of FAMILIES that `config` says, or what else it says; None: nothing readable.

    transformers runs InternLM3 through its Llama classes, and then writes those into config.json.
    """
    architectures = config.get("architectures")
    found = architectures[0] if isinstance(architectures, list) and architectures else None
    if found == "LlamaForCausalLM" and config.get("model_type") == "internlm3":
        return "InternLM3ForCausalLM"
    return found if isinstance(found, str) else None
