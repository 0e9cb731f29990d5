"""One reader for the JSON files that users hand over."""

import os
from pathlib import Path

import pytest

from xrl.config import SettingsError
from xrl.config.json_file import read_json_object


def write(folder: Path, content: bytes) -> Path:
    file = folder / "config.json"
    file.write_bytes(content)
    return file


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_an_object_is_read_with_or_without_a_byte_order_mark(mark: bytes, tmp_path: Path) -> None:
    assert read_json_object(write(tmp_path, mark + '{"a": "é"}\r\n'.encode())) == {"a": "é"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{\n"a": 1,\n}', "line 3 is not JSON"),
        (b"", "line 1 is not JSON"),
        (b"[1]", "needs a JSON object, found a list"),
        (b'{"a": "\xff"}', "is not JSON: 'utf-8' codec"),
        ('{"a": 1}'.encode("utf-16"), "is not JSON: 'utf-8' codec"),
        (b'{"a": ' + b"[" * 100_000, "nests too deeply"),
        (b'{"a": ' + b"1" * 10_000 + b"}", "is not JSON: Exceeds the limit"),
        (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "nests too deeply"),
        (b'{"a": ' * 50_000, "nests too deeply"),
        (b'{"a": 1, "b": 2, "a": 1}', "is not JSON: the key 'a' is there twice"),
        (b'{"a": [{"\x1b[2J": 1, "\x1b[2J": 1}]}'.replace(b"\x1b", b"\\u001b"), "the key '\\x1b[2J' is there twice"),
        (b'{"a": NaN}', "is not JSON: NaN is no number of JSON's"),
        (b'{"a": [-Infinity]}', "is not JSON: -Infinity is no number of JSON's"),
        (b'{"a": 1}\0', "line 1 is not JSON"),
        (b'{"a": "\x1b"}', "line 1 is not JSON"),
    ],
)
def test_anything_else_is_one_sentence_with_the_file(content: bytes, words: str, tmp_path: Path) -> None:
    file = write(tmp_path, content)
    with pytest.raises(SettingsError) as caught:
        read_json_object(file)
    assert str(caught.value).startswith(str(file)) and words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_numbers_of_any_size_are_read(tmp_path: Path) -> None:
    """Tokenizers say 10^30 for "no limit"."""
    assert read_json_object(write(tmp_path, b'{"a": 1000000000000000019884624838656}')) == {"a": int(1e30)}


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(SettingsError, match=r"config\.json is a pipe: a file is needed"):
        read_json_object(tmp_path / "config.json")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"config\.json cannot be read: No such file"):
        read_json_object(tmp_path / "config.json")
