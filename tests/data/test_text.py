"""Lines of JSON files, and text that is no text."""

from pathlib import Path
from typing import Any

import pytest

from xrl.data.text import MAX_DEPTH, check_text, numbered_lines, parse_json_object


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


def test_only_newlines_end_a_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    lines = ['{"a":\r"b"}', '{"a": "\u2028\x85\x0b\x0c"}', "   \t", '{"a": 1}\r']
    path.write_bytes("\n".join(lines).encode())
    assert [number for number, _ in numbered_lines(path)] == [1, 2, 4]
    assert [parse_json_object(line) for _, line in numbered_lines(path) if b"\x0b" not in line] == [
        {"a": "b"},
        {"a": 1},
    ]
    with pytest.raises(ValueError, match="not JSON"):  # raw control characters are not for JSON strings
        parse_json_object(lines[1].encode())


def test_byte_order_marks_are_no_part_of_lines_not_even_where_files_were_joined(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\xef\xbb\xbf{"a": 2}\n\xef\xbb\xbf\n')
    assert [(number, parse_json_object(line)) for number, line in numbered_lines(path)] == [
        (1, {"a": 1}),
        (2, {"a": 2}),
    ]


@pytest.mark.parametrize("text", ["\\ud83d", "\\udc00x", "\\ude00\\ud83d"])
def test_half_characters_are_refused_wherever_they_stand(text: str) -> None:
    row = parse_json_object(f'{{"a": "{text}", "{text}": 1}}'.encode())
    for value in (row["a"], [row["a"]], {"x": {"y": (row["a"],)}}, {list(row)[1]: 1}):
        with pytest.raises(ValueError, match=r"\\ud[8c-e]\w\w, half of a character"):
            check_text(value)


def test_whole_characters_and_other_values_pass() -> None:
    row = parse_json_object(b'{"a": "\\ud83d\\ude00 \\u0000 \\ufffe", "b": [1, 2.5, null, true, NaN]}')
    assert row["a"] == "\U0001f600 \0 \ufffe"
    check_text(row)


def test_values_nested_too_deeply_are_refused() -> None:
    check_text(nested(MAX_DEPTH))
    with pytest.raises(ValueError, match="nested deeper than 100 levels"):
        check_text(nested(MAX_DEPTH + 1))
    with pytest.raises(ValueError, match="nested too deeply to be read"):
        parse_json_object(b'{"a": ' + b"[" * 100_000)


def test_a_number_of_thousands_of_digits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not JSON \(Exceeds the limit"):
        parse_json_object(b'{"a": ' + b"1" * 10_000 + b"}")
