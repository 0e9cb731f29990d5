"""GSM8K's two layouts into prompt rows."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from xrl.config import SettingsError
from xrl.data.gsm8k import convert
from xrl.data.rows import load_rows

SOURCES = [
    {"question": "Two and three?", "answer": "2+3=<<2+3=5>>5\n#### 5"},
    {"question": "A thousand é?", "answer": "Easy.\n#### 1,000"},
]
EXPECTED_LINE = (
    '{"data_source": "openai/gsm8k", "prompt": [{"role": "user", "content": "Two and three? Let\'s think step by step '
    'and output the final answer after \\"####\\"."}], "ability": "math", "reward_model": {"style": "rule", '
    '"ground_truth": "5"}, "extra_info": {"split": "train", "index": 0, "answer": "2+3=<<2+3=5>>5\\n#### 5", '
    '"question": "Two and three?"}}'
)


def write_lines(path: Path, *rows: dict[str, str] | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def write_parquet(path: Path, *rows: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


def test_original_layout_gives_the_documented_row_byte_for_byte(tmp_path: Path) -> None:
    write_lines(tmp_path / "in" / "train.jsonl", *SOURCES)
    assert convert(tmp_path / "in", tmp_path / "out") == {"train": 2}
    lines = (tmp_path / "out" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines[0] == EXPECTED_LINE
    assert json.loads(lines[1])["reward_model"]["ground_truth"] == "1000"
    assert "é" in lines[1]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["train.jsonl"]


@pytest.mark.parametrize("folder", ["main", "."])
def test_hub_layout_gives_the_same_rows(tmp_path: Path, folder: str) -> None:
    write_lines(tmp_path / "original" / "train.jsonl", *SOURCES)
    write_lines(tmp_path / "original" / "test.jsonl", SOURCES[1])
    write_parquet(tmp_path / "hub" / folder / "train-00000-of-00002.parquet", SOURCES[0])
    write_parquet(tmp_path / "hub" / folder / "train-00001-of-00002.parquet", SOURCES[1])
    write_parquet(tmp_path / "hub" / folder / "test-00000-of-00001.parquet", SOURCES[1])
    write_parquet(tmp_path / "hub" / "socratic" / "train-00000-of-00001.parquet", SOURCES[1])
    for layout in ("original", "hub"):
        assert convert(tmp_path / layout, tmp_path / f"{layout}-out") == {"train": 2, "test": 1}
    for split in ("train", "test"):
        same = [(tmp_path / f"{layout}-out" / f"{split}.jsonl").read_bytes() for layout in ("original", "hub")]
        assert same[0] == same[1]


def test_converted_rows_can_be_trained_on(tmp_path: Path) -> None:
    write_lines(tmp_path / "test.jsonl", *SOURCES)
    convert(tmp_path, tmp_path / "out")
    assert [row.ground_truth for row in load_rows(tmp_path / "out" / "test.jsonl")] == ["5", "1000"]


def test_bad_rows_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    bad: list[dict[str, str] | str] = [
        "{",
        "[]",
        {"question": "?"},
        {"answer": "#### 1"},
        {"question": "?", "answer": "1"},
        "also",
        "bad",
    ]
    write_lines(tmp_path / "train.jsonl", SOURCES[0])
    write_lines(tmp_path / "test.jsonl", SOURCES[0], *bad)
    with pytest.raises(SettingsError) as caught:
        convert(tmp_path, tmp_path / "out")
    message = str(caught.value)
    for line, problem in [
        (2, "is not JSON"),
        (3, "is a JSON list, not an object"),
        (4, "is a row without `answer`"),
        (5, "is a row without `question`"),
        (6, "is a row whose `answer` does not end in `#### <number>`"),
    ]:
        assert f"{tmp_path / 'test.jsonl'}, line {line} {problem}" in message
    assert message.endswith("; and 2 more")
    assert "line 7" not in message
    assert not (tmp_path / "out").exists()


def test_other_content_is_replaced_only_when_asked(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", *SOURCES)
    out = tmp_path / "out"
    convert(tmp_path, out)
    convert(tmp_path, out)
    (out / "train.jsonl").write_text("mine\n")
    with pytest.raises(SettingsError, match="exists with other content: .* --overwrite"):
        convert(tmp_path, out)
    assert (out / "train.jsonl").read_text() == "mine\n"
    convert(tmp_path, out, overwrite=True)
    assert len((out / "train.jsonl").read_text().splitlines()) == 2


def test_folder_without_gsm8k_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="holds no GSM8K: needs main/train-"):
        convert(tmp_path, tmp_path / "out")
    (tmp_path / "test.jsonl").touch()
    with pytest.raises(SettingsError, match="test.jsonl is empty"):
        convert(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("final", ["banana", "", "5 apples", "1/2", "$5"])
def test_final_answer_must_be_a_number(tmp_path: Path, final: str) -> None:
    write_lines(tmp_path / "train.jsonl", {"question": "?", "answer": f"So.\n#### {final}"})
    with pytest.raises(SettingsError, match="line 1 is a row whose `answer` does not end in `#### <number>`"):
        convert(tmp_path, tmp_path / "out")


@pytest.mark.parametrize(("final", "ground_truth"), [("-3", "-3"), ("2,125.50", "2125.50"), (".5", ".5")])
def test_numbers_of_every_kind_are_taken(tmp_path: Path, final: str, ground_truth: str) -> None:
    write_lines(tmp_path / "train.jsonl", {"question": "?", "answer": f"So.\n#### {final}"})
    convert(tmp_path, tmp_path / "out")
    assert load_rows(tmp_path / "out" / "train.jsonl")[0].ground_truth == ground_truth


def test_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", *SOURCES)
    (tmp_path / "out").write_text("mine")
    with pytest.raises(SettingsError, match="--out-dir .*out cannot be made a folder"):
        convert(tmp_path, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_folder_in_the_way_of_an_output_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", *SOURCES)
    (tmp_path / "out" / "train.jsonl").mkdir(parents=True)
    with pytest.raises(SettingsError, match="is in the way and is not a file"):
        convert(tmp_path, tmp_path / "out", overwrite=True)


def test_half_characters_are_named_and_marks_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    write_lines(path, {"question": "half \ud83d?", "answer": "#### 5"}, {"question": "?", "answer": "\udc00 #### 5"})
    with pytest.raises(SettingsError) as caught:
        convert(tmp_path, tmp_path / "out")
    assert f"{path}, line 1 is a row whose `question` has \\ud83d, half of a character" in str(caught.value)
    assert f"{path}, line 2 is a row whose `answer` has \\udc00" in str(caught.value)
    write_lines(path, SOURCES[0])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert convert(tmp_path, tmp_path / "out") == {"train": 1}


def test_a_folder_whose_name_is_a_pattern_is_read_itself(tmp_path: Path) -> None:
    for name in ("[ab]", "a"):
        write_parquet(tmp_path / name / "main" / "test-00000-of-00001.parquet", *SOURCES[: 1 + (name == "a")])
    assert convert(tmp_path / "[ab]", tmp_path / "out") == {"test": 1}


def test_files_missing_of_a_split_are_noticed(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-00000-of-00002.parquet", SOURCES[0])
    with pytest.raises(SettingsError, match="has 1 of the 2 files of its split"):
        convert(tmp_path, tmp_path / "out")
    write_parquet(tmp_path / "train-00001-of-00002.parquet", SOURCES[1])
    assert convert(tmp_path, tmp_path / "out") == {"train": 2}
