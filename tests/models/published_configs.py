"""config.json of widely used checkpoints: their keys and values, as published (facts alone)."""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "vocab_size",
)
BASICS: Config = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
}
QWEN: Config = {**BASICS, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "use_sliding_window": False}
QWEN2: Config = {**QWEN, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "max_window_layers": 28}
QWEN3: Config = {
    **QWEN,
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "max_window_layers": 36,
    "rope_scaling": None,
    "sliding_window": None,
}
EXPERTS: Config = {
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
QWEN2_MOE: Config = {
    **QWEN,
    **EXPERTS,
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "max_window_layers": 21,
    "norm_topk_prob": False,
    "sliding_window": 32768,
}
QWEN3_MOE: Config = {
    **QWEN3,
    **EXPERTS,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}
# The coding models name what others leave out.
QWEN3_CODER: Config = {**QWEN3_MOE, "qkv_bias": False, "shared_expert_intermediate_size": 0, "use_qk_norm": True}
LLAMA: Config = {
    **BASICS,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "attention_bias": False,
    "mlp_bias": False,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
}
LLAMA3_ROPE: Config = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA31: Config = {**LLAMA, "rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE, "eos_token_id": [128001, 128009]}
LLAMA32: Config = {**LLAMA31, "rope_scaling": {**LLAMA3_ROPE, "factor": 32.0}, "tie_word_embeddings": True}
SMOLLM2: Config = {
    **LLAMA,
    "initializer_range": 0.041666666666666664,
    "is_llama_config": True,
    "rope_interleaved": False,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
}
MISTRAL: Config = {
    **BASICS,
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
}
INTERNLM3: Config = {
    **BASICS,
    "architectures": ["InternLM3ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_internlm3.InternLM3Config"},
    "bias": False,
    "head_dim": 128,
    "model_type": "internlm3",
    "pad_token_id": 2,
    "qkv_bias": False,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 6.0, "rope_type": "dynamic"},
    "rope_theta": 50000000,
}
DEEPSEEK_V3: Config = {
    **BASICS,
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "kv_lora_rank": 512,
    "model_type": "deepseek_v3",
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "pretraining_tp": 1,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
}
MOONLIGHT: Config = {
    **DEEPSEEK_V3,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "num_nextn_predict_layers": 0,
    "pad_token_id": 163838,
    "q_lora_rank": None,
    "rms_norm_eps": 1e-05,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "topk_group": 1,
}
NO_MROPE: Config = {"use_mrope": False}
TIED: Config = {"tie_word_embeddings": True}
UNSLOTH: Config = {"unsloth_fixed": True, "unsloth_version": "2025.3.3", "pad_token_id": 128004}


def published(family: Config, *sizes: int, **further: Any) -> Config:
    """A config of a family with its SIZES, in that order."""
    return {**family, **dict(zip(SIZES, sizes, strict=True)), **further}


# Trained as they are published.
PUBLISHED: dict[str, Config] = {
    "Qwen2-0.5B-Instruct": published(QWEN2, 896, 4864, 24, 14, 2, 32768, 151936, sliding_window=32768, **TIED),
    "Qwen2-7B-Instruct": published(QWEN2, 3584, 18944, 28, 28, 4, 32768, 152064, sliding_window=131072),
    "Qwen2.5-0.5B": published(QWEN2, 896, 4864, 24, 14, 2, 32768, 151936, sliding_window=32768, **TIED, **NO_MROPE),
    "Qwen2.5-1.5B": published(QWEN2, 1536, 8960, 28, 12, 2, 131072, 151936, sliding_window=131072, **TIED, **NO_MROPE),
    "Qwen2.5-3B-Instruct": published(QWEN2, 2048, 11008, 36, 16, 2, 32768, 151936, sliding_window=32768, **TIED),
    "Qwen2.5-7B": published(QWEN2, 3584, 18944, 28, 28, 4, 131072, 152064, sliding_window=131072, **NO_MROPE),
    "Qwen2.5-7B-Instruct": published(QWEN2, 3584, 18944, 28, 28, 4, 32768, 152064, sliding_window=131072),
    "Qwen2.5-14B-Instruct": published(QWEN2, 5120, 13824, 48, 40, 8, 32768, 152064, sliding_window=131072),
    "Qwen2.5-32B-Instruct": published(QWEN2, 5120, 27648, 64, 40, 8, 32768, 152064, sliding_window=131072),
    "Qwen2.5-72B-Instruct": published(QWEN2, 8192, 29568, 80, 64, 8, 32768, 152064, sliding_window=131072),
    "Qwen2.5-Math-1.5B": published(
        QWEN2, 1536, 8960, 28, 12, 2, 4096, 151936, sliding_window=4096, rope_theta=10000, **TIED, **NO_MROPE
    ),
    "Qwen2.5-Math-7B": published(
        QWEN2, 3584, 18944, 28, 28, 4, 4096, 152064, sliding_window=4096, rope_theta=10000, **NO_MROPE
    ),
    "Qwen2.5-Coder-7B-Instruct": published(QWEN2, 3584, 18944, 28, 28, 4, 32768, 152064, sliding_window=131072),
    "QwQ-32B": published(QWEN2, 5120, 27648, 64, 40, 8, 40960, 152064, sliding_window=32768),
    "DeepSeek-R1-Distill-Qwen-1.5B": published(
        QWEN2, 1536, 8960, 28, 12, 2, 131072, 151936, sliding_window=4096, rope_theta=10000, **NO_MROPE
    ),
    "DeepSeek-R1-Distill-Qwen-7B": published(
        QWEN2, 3584, 18944, 28, 28, 4, 131072, 152064, sliding_window=4096, rope_theta=10000, **NO_MROPE
    ),
    "Qwen3-0.6B": published(QWEN3, 1024, 3072, 28, 16, 8, 40960, 151936, **TIED),
    "Qwen3-1.7B": published(QWEN3, 2048, 6144, 28, 16, 8, 40960, 151936, **TIED),
    "Qwen3-4B-Instruct-2507": published(QWEN3, 2560, 9728, 36, 32, 8, 262144, 151936, rope_theta=5000000, **TIED),
    "Qwen3-8B": published(QWEN3, 4096, 12288, 36, 32, 8, 40960, 151936),
    "Qwen3-14B": published(QWEN3, 5120, 17408, 40, 40, 8, 40960, 151936),
    "Qwen3-32B": published(QWEN3, 5120, 25600, 64, 64, 8, 40960, 151936),
    "Qwen3-30B-A3B": published(QWEN3_MOE, 2048, 6144, 48, 32, 4, 40960, 151936, moe_intermediate_size=768),
    "Qwen3-235B-A22B": published(QWEN3_MOE, 4096, 12288, 94, 64, 4, 40960, 151936, moe_intermediate_size=1536),
    "Qwen3-Coder-30B-A3B": published(QWEN3_CODER, 2048, 5472, 48, 32, 4, 262144, 151936, moe_intermediate_size=768),
    "Qwen1.5-MoE-A2.7B": published(
        QWEN2_MOE, 2048, 5632, 24, 16, 16, 8192, 151936,
        moe_intermediate_size=1408, num_experts=60, num_experts_per_tok=4, shared_expert_intermediate_size=5632,
    ),
    "Qwen2-57B-A14B": published(
        QWEN2_MOE, 3584, 18944, 28, 28, 4, 32768, 151936,
        moe_intermediate_size=2560, num_experts=64, num_experts_per_tok=8, shared_expert_intermediate_size=20480,
    ),
    "Llama-2-7b": published(LLAMA, 4096, 11008, 32, 32, 32, 4096, 32000, _name_or_path="Llama-2-7b-hf"),
    "Meta-Llama-3-8B": published(LLAMA, 4096, 14336, 32, 32, 8, 8192, 128256, rope_theta=500000.0),
    "Llama-3.1-8B": published(LLAMA31, 4096, 14336, 32, 32, 8, 131072, 128256),
    "Llama-3.1-8B, uploaded by another tool": published(LLAMA31, 4096, 14336, 32, 32, 8, 131072, 128256, **UNSLOTH),
    "Llama-3.2-1B": published(LLAMA32, 2048, 8192, 16, 32, 8, 131072, 128256, head_dim=64),
    "Llama-3.2-3B": published(LLAMA32, 3072, 8192, 28, 24, 8, 131072, 128256, head_dim=128),
    "Llama-3.3-70B-Instruct": published(LLAMA31, 8192, 28672, 80, 64, 8, 131072, 128256),
    "DeepSeek-R1-Distill-Llama-8B": published(LLAMA31, 4096, 14336, 32, 32, 8, 131072, 128256, eos_token_id=128001),
    "SmolLM2-135M": published(SMOLLM2, 576, 1536, 30, 9, 3, 8192, 49152),
    "SmolLM2-1.7B": published(SMOLLM2, 2048, 8192, 24, 32, 32, 8192, 49152, rope_theta=130000),
    "TinyLlama-1.1B-Chat": published(LLAMA, 2048, 5632, 22, 32, 4, 2048, 32000),
    "Falcon3-7B": published(
        LLAMA, 3072, 23040, 28, 12, 4, 32768, 131072, activation="swiglu", head_dim=256, rope_theta=1000042
    ),
    "Mistral-7B-v0.1": published(
        MISTRAL, 4096, 14336, 32, 32, 8, 32768, 32000, sliding_window=4096, rope_theta=10000.0
    ),
    "Mistral-7B-v0.3": published(MISTRAL, 4096, 14336, 32, 32, 8, 32768, 32768),
    "Mistral-Nemo-12B": published(MISTRAL, 5120, 14336, 40, 32, 8, 131072, 131072, head_dim=128),
    "Mistral-Small-24B": published(
        MISTRAL, 5120, 32768, 40, 32, 8, 32768, 131072, head_dim=128, rope_theta=100000000.0
    ),
    "internlm3-8b-instruct": published(INTERNLM3, 4096, 10240, 48, 32, 2, 32768, 128512),
    "Moonlight-16B-A3B": published(MOONLIGHT, 2048, 11264, 27, 16, 16, 8192, 163840),
}  # fmt: skip

YARN: Config = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "attn_factor": 0.878}
FP8: Config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
# Of our families, but with maths or weights that we do not train: what the refusal says.
REFUSED: dict[str, tuple[Config, str]] = {
    "DeepSeek-R1-0528-Qwen3-8B": (
        published(QWEN3, 4096, 12288, 36, 32, 8, 131072, 151936, rope_scaling=YARN),
        "rope_scaling has type 'yarn'",
    ),
    "DeepSeek-V3, its weights in bf16": (
        published(
            {**MOONLIGHT, "rope_scaling": {"type": "yarn", "factor": 40}}, 7168, 18432, 61, 128, 128, 163840, 129280
        ),
        "rope_scaling has type 'yarn'",
    ),
    "Qwen3-8B-FP8": (
        published(QWEN3, 4096, 12288, 36, 32, 8, 40960, 151936, quantization_config=FP8),
        "quantization_config is set",
    ),
    "deepseek-coder-6.7b": (
        published(LLAMA, 4096, 11008, 32, 32, 32, 16384, 32256, rope_scaling={"type": "linear", "factor": 4.0}),
        "rope_scaling has type 'linear'",
    ),
    "Qwen2.5-7B-Instruct-1M": (
        published(QWEN2, 3584, 18944, 28, 28, 4, 1010000, 152064, dual_chunk_attention_config={"chunk_size": 262144}),
        "dual_chunk_attention_config",
    ),
}
