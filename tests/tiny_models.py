"""Tiny random checkpoints, with tokenizer, as `save_pretrained` writes them."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# The commonest first: a smaller vocabulary leaves out the last ones. Newline and space as byte-level BPE writes them,
# because transformers reads every qwen2 tokenizer as byte-level.
CHARACTERS = "ĊĠ" + string.digits + string.ascii_lowercase + string.ascii_uppercase + string.punctuation
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Wavelengths of both ends and of the middle of what is stretched, with heads of 16.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Family -> name of transformers' config class, and fields beside the sizes that all tiny models share. A name, because
# not every transformers has all of them.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "llama": ("LlamaConfig", {"rope_parameters": LLAMA3_ROPE, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", {"head_dim": 32, "sliding_window": None}),
    "internlm3": ("InternLM3Config", {"head_dim": 16, "rope_parameters": {"rope_type": "dynamic", "factor": 6.0}}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "num_experts": 8,
            "num_experts_per_tok": 3,
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            "head_dim": 16,
            "moe_intermediate_size": 32,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "moe_intermediate_size": 32,
            "n_routed_experts": 8,
            "n_shared_experts": 2,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "q_lora_rank": 24,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "num_nextn_predict_layers": 0,
        },
    ),
}


def make_checkpoint(
    folder: Path,
    *,
    family: str = "qwen3",
    tied: bool = True,
    seed: int = 0,
    with_tokenizer: bool = True,
    max_shard_bytes: int | None = None,
    **config_overrides: Any,
) -> Path:
    """Write a random model of about 150,000 parameters to `folder`, and return that.

    Args:
        family: a key of FAMILIES.
        max_shard_bytes: split the weights into files of about this size, with an index.
        config_overrides: fields of config.json, `num_hidden_layers=6` say.
    """
    model = make_model(family, tied=tied, seed=seed, **config_overrides)
    shard_size: dict[str, Any] = {} if max_shard_bytes is None else {"max_shard_size": max_shard_bytes}
    model.save_pretrained(folder, **shard_size)
    if with_tokenizer:
        make_tokenizer(folder, model.config.vocab_size)
    return folder


def make_model(family: str = "qwen3", *, tied: bool = True, seed: int = 0, **config_overrides: Any) -> PreTrainedModel:
    """A random fp32 decoder with grouped-query attention, in eval mode."""
    sizes = {
        "vocab_size": 98,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": SPECIAL_TOKENS.index("<|im_end|>"),
        "pad_token_id": SPECIAL_TOKENS.index("<|endoftext|>"),
    }
    torch.manual_seed(seed)
    config_class, fields = FAMILIES[family]
    config = getattr(transformers, config_class)(**(sizes | fields | config_overrides))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # ones and zeros would hide a norm or a bias that is left out
        for name, tensor in model.state_dict().items():
            if name.endswith("bias"):
                tensor.normal_(0, 0.3)
            elif "norm" in name:
                tensor.uniform_(0.5, 1.5)
    return model.eval()


def make_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a tokenizer of single characters and ChatML marks, with at most `vocab_size` ids, to `folder`."""
    tokens = [*SPECIAL_TOKENS, *CHARACTERS][:vocab_size]
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=SPECIAL_TOKENS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=SPECIAL_TOKENS[0],
        pad_token=SPECIAL_TOKENS[0],
        eos_token=SPECIAL_TOKENS[2],
        clean_up_tokenization_spaces=False,
    )
    whole.chat_template = CHAT_TEMPLATE
    whole.save_pretrained(folder)
