"""The tokenizer's tokens are those that tokenizer.json says."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from tests.small_runs import edit_json
from tests.tiny_models import make_tokenizer
from xrl.config import SettingsError
from xrl.data.tokenizer import load_tokenizer, stop_token_ids

TEXT = "Ana has 12 cakes and 650841823 boxes.\nHow many are left? It's 2023, hello caf\u00e9 cafe\u0301!"
THREE_DIGITS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def make(folder: Path, *, model_type: str, tokenizer_class: str, normalizer: Any) -> Tokenizer:
    """A byte-level tokenizer that cuts numbers into threes, in a folder that says what class it is of."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(THREE_DIGITS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 50, trainer)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    config = {"tokenizer_class": tokenizer_class, "eos_token": "<|im_end|>", "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer


@pytest.mark.parametrize(
    ("model_type", "tokenizer_class"),
    [
        ("qwen2", "PreTrainedTokenizerFast"),
        ("qwen2", "Qwen2Tokenizer"),
        ("qwen3", "Qwen2TokenizerFast"),
        ("llama", "GPT2Tokenizer"),
        ("llama", "LlamaTokenizerFast"),
        ("llama", "PreTrainedTokenizerFast"),
        ("deepseek_v3", "LlamaTokenizerFast"),
    ],
)
@pytest.mark.parametrize("normalizer", [None, normalizers.NFC(), normalizers.NFKC()], ids=["none", "NFC", "NFKC"])
def test_tokens_are_those_of_tokenizer_json(
    model_type: str, tokenizer_class: str, normalizer: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    expected = make(folder, model_type=model_type, tokenizer_class=tokenizer_class, normalizer=normalizer)
    tokenizer = load_tokenizer(folder)
    token_ids = expected.encode(TEXT, add_special_tokens=False).ids
    assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == token_ids
    assert tokenizer.decode(token_ids) == expected.decode(token_ids)
    # What the configuration beside it says is kept.
    assert (tokenizer.eos_token, tokenizer.chat_template) == ("<|im_end|>", "{{ messages }}")


def test_only_a_difference_is_spoken_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_tokenizer(tmp_path / "same", 98)
    with caplog.at_level(logging.WARNING, logger="xrl"):
        load_tokenizer(tmp_path / "same")
    assert not caplog.records


def test_truncation_and_padding_that_were_saved_are_no_difference(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_tokenizer(tmp_path / "model", 98)
    file = tmp_path / "model" / "tokenizer.json"
    saved = Tokenizer.from_file(str(file))
    saved.enable_truncation(3)
    saved.enable_padding(length=7)
    saved.save(str(file))
    with caplog.at_level(logging.WARNING, logger="xrl"):
        assert len(load_tokenizer(tmp_path / "model")("1+1=2", add_special_tokens=False)["input_ids"]) == 5
    assert not caplog.records


def test_damaged_tokenizers_are_one_sentence(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "model", 98)
    (tmp_path / "model" / "tokenizer.json").write_text('{"model": {"type": "none of these"}}')
    with pytest.raises(SettingsError, match=r"the tokenizer in .* cannot be loaded"):
        load_tokenizer(tmp_path / "model")


def test_end_of_text_is_read_behind_a_byte_order_mark(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "model", 98)
    (tmp_path / "model" / "generation_config.json").write_bytes(b'\xef\xbb\xbf{"eos_token_id": [0, 1]}')
    tokenizer = load_tokenizer(tmp_path / "model")
    assert stop_token_ids(tmp_path / "model", tokenizer) == (0, 1, 2)


def test_settings_that_the_library_cannot_use_are_one_sentence(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "model", 98)
    edit_json(tmp_path / "model" / "tokenizer_config.json", model_max_length="long")
    with pytest.raises(SettingsError, match=r"the tokenizer in .* cannot be used as tokenizer_config.json says"):
        load_tokenizer(tmp_path / "model")


def test_what_is_no_file_says_nothing_of_end_of_text(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "model", 98)
    (tmp_path / "model" / "config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "model" / "generation_config.json").unlink(missing_ok=True)
    tokenizer = load_tokenizer(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").mkdir()
    assert stop_token_ids(tmp_path / "model", tokenizer) == (2, 7)
