"""Parts of a decoder that only some families have."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3's stretching of rotary wavelengths beyond the lengths of pretraining."""

    factor: float  # by which the longest wavelengths grow
    low_freq_factor: float  # wavelengths above original_max_positions / this grow in full
    high_freq_factor: float  # those below original_max_positions / this stay
    original_max_positions: int  # tokens


@dataclass(frozen=True, kw_only=True)
class ExpertShape:
    """A mixture of experts in place of the MLP."""

    num_experts: int
    experts_per_token: int
    ffn_hidden_size: int  # of each expert
    normalize_top_k: bool  # weights of a token's experts are divided by their sum
    shared_ffn_hidden_size: int = 0  # 0: no shared expert
    shared_gate: bool = False  # the shared expert's output is weighted by a gate of its own (Qwen2-MoE)
    first_dense_layers: int = 0  # layers at the bottom that have a plain MLP instead
    score_function: str = "softmax"  # or "sigmoid" (DeepSeek-V3)
    score_bias: bool = False  # a learnt bias counts when experts are chosen, but not in their weights (DeepSeek-V3)
    num_groups: int = 1  # experts stand in so many groups,
    groups_per_token: int = 1  # of which a token may use so many
    scaling_factor: float = 1.0  # of the chosen experts' weights


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """DeepSeek's multi-head latent attention (arXiv:2405.04434): keys and values come from one narrow projection."""

    q_lora_rank: int | None  # None: queries are projected at once
    kv_lora_rank: int
    qk_nope_head_dim: int  # part of a head that is not rotated
    qk_rope_head_dim: int  # part that is, its keys shared by all heads
    v_head_dim: int
