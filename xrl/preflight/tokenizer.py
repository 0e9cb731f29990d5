"""Tokenizer files: there, and without ids that the model has no embedding for."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from xrl.config import SettingsError
from xrl.config.files import open_regular
from xrl.config.json_file import read_json_object
from xrl.config.printable import shortened, shown

_WHOLE = "tokenizer.json"
_PARTS = ("vocab.json", "merges.txt")  # what older checkpoints have in its place
# Our own reader skips a byte order mark; these are read by transformers, which stumbles over it.
_READ_BY_TRANSFORMERS = (
    "config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    _WHOLE,
    *_PARTS,
)


_OBJECTS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "generation_config.json",
)


def check_tokenizer(folder: Path, *, vocab_size: int) -> None:
    """Refuse a folder without a tokenizer, or with one of another model.

    Raises:
        SettingsError: no tokenizer files, a file beside them that is damaged, or an id that the model does not have.
    """
    _check_companions(folder)
    _check_end_of_text(folder, vocab_size)
    whole = folder / _WHOLE
    if whole.is_file():
        _check_ids(whole, _ids(whole, read_json_object(whole)), vocab_size)
    elif all((folder / name).is_file() for name in _PARTS):
        for name in (_PARTS[0], "added_tokens.json"):
            file = folder / name
            if file.is_file():
                vocabulary = read_json_object(file)
                _check_unlike(file, vocabulary)
                _check_ids(file, vocabulary.items(), vocab_size)
    else:
        raise SettingsError(f"--model {folder} has no tokenizer: {_WHOLE} (or {' and '.join(_PARTS)}) is needed")


def _check_companions(folder: Path) -> None:
    more = folder / "additional_chat_templates"
    for path in sorted([*folder.iterdir(), *(more.iterdir() if more.is_dir() else ())]):
        if path.exists() and not path.is_file() and not path.is_dir():
            open_regular(path).close()  # which says what it is: the library would wait for whoever writes to a pipe
    templates = (folder / "chat_template.jinja", *sorted(more.glob("*.jinja")))
    for file in (*(folder / name for name in _READ_BY_TRANSFORMERS), *templates):
        if file.is_file() and _starts_with_mark(file):
            raise SettingsError(
                f"{file} starts with a byte order mark, which transformers does not take: save it as UTF-8 without one"
            )
    for name in _OBJECTS:
        if (folder / name).is_file():
            read_json_object(folder / name)


def _check_end_of_text(folder: Path, vocab_size: int) -> None:
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        found = read_json_object(file).get("eos_token_id") if file.is_file() else None
        ids = found if isinstance(found, list) else [] if found is None else [found]
        if not all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in ids):
            raise SettingsError(
                f"{file}: eos_token_id must be a token id or a list of them, found {shortened(json.dumps(found), 100)}"
            )
        for token_id in ids:
            if not 0 <= token_id < vocab_size:
                raise SettingsError(
                    f"{file}: eos_token_id {shown(token_id)} is no token of the model, whose vocab_size is {vocab_size}"
                )


def _starts_with_mark(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8


def _ids(file: Path, tokenizer: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        _check_unlike(file, vocabulary)
        yield from vocabulary.items()
    elif isinstance(vocabulary, list):  # unigram: [token, score], the id is the place
        for token_id, entry in enumerate(vocabulary):
            yield entry[0] if isinstance(entry, list) and entry else entry, token_id
    added = tokenizer.get("added_tokens")
    if not isinstance(added, list | None):
        raise SettingsError(f"{file}: added_tokens must be a list, found {shown(added)}")
    for token in added or ():
        yield (token.get("content"), token.get("id")) if isinstance(token, dict) else (token, None)


def _check_unlike(file: Path, vocabulary: Mapping[str, Any]) -> None:
    """Two tokens of one id: which one it stands for, tokenizers decide by chance at each start."""
    first: dict[Any, str] = {}
    for content, token_id in vocabulary.items():
        if type(token_id) is int and first.setdefault(token_id, content) != content:
            raise SettingsError(
                f"{file}: tokens {shown(first[token_id])} and {shown(content)} have the same id {token_id}: each "
                f"token needs one of its own"
            )


def _check_ids(file: Path, ids: Iterable[tuple[Any, Any]], vocab_size: int) -> None:
    largest, token, num_beyond = -1, "", 0
    for content, token_id in ids:
        if type(token_id) is not int or token_id < 0:
            raise SettingsError(
                f"{file}: token {shown(content)} needs a whole number >= 0 as its id, found {shown(token_id)}"
            )
        num_beyond += token_id >= vocab_size
        if token_id > largest:
            largest, token = token_id, content
    if largest < 0:
        raise SettingsError(f"{file} holds no tokens: it is not a tokenizer")
    if largest >= vocab_size:
        # A pad token that was added to the tokenizer alone, or another tokenizer altogether.
        is_added = num_beyond * 10 < vocab_size
        count = "this one added token has" if num_beyond == 1 else f"{num_beyond:,} added tokens have"
        reason = f"{count} no embedding: give the model one, or remove them" if is_added else "it is another model's"
        raise SettingsError(
            f"{file}: token {shown(token)} has id {largest}, but the model's vocab_size is {vocab_size}: {reason}"
        )
