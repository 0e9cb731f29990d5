"""Tiny random checkpoints, with tokenizer, as `save_pretrained` writes them."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

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
        family: "qwen3" or "qwen2".
        max_shard_bytes: split the weights into files of about this size, with an index.
        config_overrides: fields of config.json, `num_hidden_layers=6` say.
    """
    model = make_model(family, tied=tied, seed=seed, **config_overrides)
    shard_size = {} if max_shard_bytes is None else {"max_shard_size": max_shard_bytes}
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
    model: PreTrainedModel
    if family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**(sizes | config_overrides)))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**({**sizes, "head_dim": 16} | config_overrides)))
    else:
        raise ValueError(f"family must be qwen2 or qwen3, got {family!r}")
    with torch.no_grad():  # ones and zeros would hide a norm or a bias that is left out
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
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
