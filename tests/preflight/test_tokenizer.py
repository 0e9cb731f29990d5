"""A model without its tokenizer, or with another model's, is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.small_runs import Refusal, check, edit_json
from xrl.config import SettingsError
from xrl.preflight.tokenizer import check_tokenizer


def test_missing_tokenizer_is_refused(refusal: Refusal, model: Path) -> None:
    (model / "tokenizer.json").unlink()
    assert f"--model {model} has no tokenizer" in refusal()


def test_two_tokens_of_one_id_are_named(refusal: Refusal, model: Path, tmp_path: Path) -> None:
    file = model / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    first, second, *_ = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"][second] = tokenizer["model"]["vocab"][first]
    file.write_text(json.dumps(tokenizer))
    same = f"tokens '{first}' and '{second}' have the same id {tokenizer['model']['vocab'][first]}"
    assert same in refusal()
    folder = tmp_path / "older"
    folder.mkdir()
    (folder / "vocab.json").write_text('{"a": 0, "b": 1, "c": 1}')
    (folder / "merges.txt").write_text("")
    with pytest.raises(SettingsError, match="tokens 'b' and 'c' have the same id 1"):
        check_tokenizer(folder, vocab_size=2)


def test_token_beyond_the_vocabulary_is_named(refusal: Refusal, model: Path) -> None:
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    added = [*tokenizer["added_tokens"], {"id": 98, "content": "<|extra|>"}]
    edit_json(model / "tokenizer.json", added_tokens=added)
    sentence = refusal()
    assert "'<|extra|>' has id 98" in sentence and "vocab_size is 98" in sentence
    assert sentence.endswith("this one added token has no embedding: give the model one, or remove them")


def test_file_that_is_no_tokenizer_is_refused(refusal: Refusal, model: Path) -> None:
    (model / "tokenizer.json").write_text("{}")
    assert "it is not a tokenizer" in refusal()


def test_tokenizer_of_two_files_passes_and_its_ids_are_checked(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    check_tokenizer(tmp_path, vocab_size=2)
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 2}')
    check_tokenizer(tmp_path, vocab_size=3)
    with pytest.raises(SettingsError, match=r"added_tokens.json: token '<\|im_end\|>' has id 2"):
        check_tokenizer(tmp_path, vocab_size=2)


def test_unigram_tokens_are_numbered_by_their_place(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": [["a", -1.0], ["b", -2.0]]}}))
    check_tokenizer(tmp_path, vocab_size=2)
    with pytest.raises(SettingsError, match="token 'b' has id 1"):
        check_tokenizer(tmp_path, vocab_size=1)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_damaged_file_beside_the_tokenizer_is_named(refusal: Refusal, model: Path, name: str) -> None:
    (model / name).write_text("{")
    assert f"{model}/{name}, line 1 is not JSON" in refusal()


@pytest.mark.parametrize("found", ["</s>", [1, "2"], True])
def test_end_of_text_must_be_token_ids(refusal: Refusal, model: Path, found: object) -> None:
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": found}))
    assert "generation_config.json: eos_token_id must be a token id or a list of them" in refusal()


@pytest.mark.parametrize("found", [-1, [0, 10**30]])
def test_end_of_text_must_be_tokens_of_the_model(refusal: Refusal, model: Path, found: object) -> None:
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": found}))
    assert "is no token of the model, whose vocab_size is" in refusal()


def test_another_model_s_tokenizer_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({str(token_id): token_id for token_id in range(200)}))
    (tmp_path / "merges.txt").touch()
    with pytest.raises(SettingsError, match="token '199' has id 199, .* vocab_size is 100: it is another model's"):
        check_tokenizer(tmp_path, vocab_size=100)
    with pytest.raises(SettingsError, match="vocab_size is 195: 5 added tokens have no embedding"):
        check_tokenizer(tmp_path, vocab_size=195)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "additional_chat_templates/a.jinja",
    ],
)
def test_a_byte_order_mark_that_transformers_stumbles_over_is_refused(refusal: Refusal, model: Path, name: str) -> None:
    file = model / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"\xef\xbb\xbf" + (file.read_bytes() if file.exists() else b""))
    assert refusal().startswith(f"{file} starts with a byte order mark")


def test_a_byte_order_mark_before_what_we_read_ourselves_passes(model: Path, data: Path, tmp_path: Path) -> None:
    file = model / "generation_config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    check(model, data, tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"added_tokens": 5}, "added_tokens must be a list, found 5"),
        ({"added_tokens": [5]}, "token 5 needs a whole number >= 0 as its id, found None"),
        ({"added_tokens": [{"id": True, "content": "x"}]}, "token 'x' needs a whole number >= 0 as its id, found True"),
        ({"added_tokens": [{"id": -1, "content": "x"}]}, "token 'x' needs a whole number >= 0 as its id, found -1"),
        ({"added_tokens": [{"id": 10**400, "content": "x"}]}, "token 'x' has id 10"),
        ({"model": {"vocab": {"a\x1b[2J": "0"}}}, "token 'a\\x1b[2J' needs a whole number >= 0 as its id, found '0'"),
        ({"model": None, "added_tokens": []}, "it is not a tokenizer"),
        ({"model": {"vocab": []}, "added_tokens": None}, "it is not a tokenizer"),
    ],
)
def test_keys_of_the_wrong_type_are_one_sentence(
    refusal: Refusal, model: Path, changes: dict[str, object], words: str
) -> None:
    edit_json(model / "tokenizer.json", **changes)
    sentence = refusal()
    assert sentence.startswith(f"{model}/tokenizer.json") and words in sentence
