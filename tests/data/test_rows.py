"""Reading prompt files, and the sentences for bad ones."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from xrl.config import SettingsError
from xrl.data.rows import check_dataset, load_rows

DEEP = '{"prompt": "x", "ground_truth": "1", "extra_info": {"deep": ' + "[" * 200 + "]" * 200 + "}}"
CHAT = [{"role": "user", "content": "How many?"}]


def good_row(**changes: Any) -> dict[str, Any]:
    row = {"data_source": "here", "prompt": CHAT, "reward_model": {"style": "rule", "ground_truth": "72"}}
    return {name: value for name, value in {**row, **changes}.items() if value is not None}


def write_lines(folder: Path, *rows: dict[str, Any] | str) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def write_parquet(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


@pytest.mark.parametrize("write", [write_lines, write_parquet])
def test_rows_are_read_in_file_order(tmp_path: Path, write: Any) -> None:
    path = write(tmp_path, good_row(extra_info={"level": 3}), good_row(prompt=[{"role": "user", "content": "Who?"}]))
    assert check_dataset(path, min_rows=2) == 2
    first, second = load_rows(path)
    assert (first.id, first.prompt, first.ground_truth, first.data_source) == (0, CHAT, "72", "here")
    assert first.extra == {"level": 3}
    assert (second.id, second.prompt) == (1, [{"role": "user", "content": "Who?"}])


def test_string_prompts_and_plain_ground_truths_are_fine(tmp_path: Path) -> None:
    path = write_lines(tmp_path, {"prompt": "2 + 2 = ", "ground_truth": 4}, {"prompt": CHAT, "ground_truth": "x"})
    assert [(row.id, row.prompt, row.ground_truth) for row in load_rows(path)] == [(0, "2 + 2 = ", "4"), (1, CHAT, "x")]


def test_blank_lines_are_not_rows_but_count_as_lines(tmp_path: Path) -> None:
    path = write_lines(tmp_path, good_row(), "", good_row())
    assert check_dataset(path, min_rows=1) == 2
    assert [row.id for row in load_rows(path)] == [0, 1]
    with pytest.raises(SettingsError, match="line 3 is not JSON"):
        check_dataset(write_lines(tmp_path, good_row(), "", "{"), min_rows=1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json", r"line 2 is not JSON \(.*\); each line must be one JSON object"),
        ("[1, 2]", "line 2 is a JSON list, not an object"),
        (good_row(prompt=None), "line 2 has no `prompt`"),
        (good_row(prompt=[]), "line 2 has no `prompt`"),
        (good_row(prompt=3), "line 2 has a `prompt` that is neither"),
        (good_row(prompt=[{"role": "user"}]), "line 2 has a `prompt` that is neither"),
        (good_row(reward_model=None), "line 2 has no ground truth: give `reward_model.ground_truth` or `ground_truth`"),
        (good_row(reward_model={"ground_truth": ""}), "line 2 has no ground truth"),
        (good_row(reward_model={"ground_truth": ["7"]}), "line 2 has a ground truth that is neither"),
        (good_row(extra_info="hard"), "line 2 has an `extra_info` that is not an object"),
        (good_row(prompt="half \ud83d"), r"line 2: `prompt` has \\ud83d, half of a character"),
        (good_row(prompt=[{"role": "\ud83d", "content": "x"}]), "line 2: `prompt` has"),
        (good_row(reward_model={"ground_truth": "\ud83d"}), "line 2: `reward_model` has"),
        (good_row(reward_model=None, ground_truth="\ud83d"), "line 2: `ground_truth` has"),
        (good_row(data_source="\ud83d"), "line 2: `data_source` has"),
        (good_row(extra_info={"\ud83d": 1}), "line 2: `extra_info` has"),
        (DEEP, "line 2: `extra_info` has values nested deeper"),
        ("[" * 100_000, "line 2 is nested too deeply to be read"),
    ],
)
def test_bad_row_is_named_by_file_and_line(tmp_path: Path, row: dict[str, Any] | str, message: str) -> None:
    path = write_lines(tmp_path, good_row(), row)
    for read in (lambda: check_dataset(path, min_rows=1), lambda: load_rows(path)):
        with pytest.raises(SettingsError, match=f"{path}, {message}"):
            read()


def test_bad_parquet_row_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path, good_row(), good_row(), good_row(reward_model={"style": "rule"}))
    with pytest.raises(SettingsError, match=f"{path}, row 3 has no ground truth"):
        check_dataset(path, min_rows=1)


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path, good_row())
    path.write_bytes(path.read_bytes() + b'{"prompt": "\xff"}\n')
    with pytest.raises(SettingsError, match="line 2 is not JSON"):
        check_dataset(path, min_rows=1)


def test_file_that_is_not_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    path.write_text("{}")
    with pytest.raises(SettingsError, match="is not a parquet file that can be read"):
        check_dataset(path, min_rows=1)


def test_empty_and_absent_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"--eval-data .*data.jsonl is empty"):
        check_dataset(write_lines(tmp_path), min_rows=0, what="--eval-data")
    with pytest.raises(SettingsError, match="absent.jsonl does not exist"):
        check_dataset(tmp_path / "absent.jsonl", min_rows=1)
    with pytest.raises(SettingsError, match="is a folder"):
        check_dataset(tmp_path, min_rows=1)
    (tmp_path / "data.csv").touch()
    with pytest.raises(SettingsError, match=r"must end in one of .jsonl, .json, .parquet, got '.csv'"):
        check_dataset(tmp_path / "data.csv", min_rows=1)


def test_dataset_smaller_than_a_batch_is_refused_with_both_numbers(tmp_path: Path) -> None:
    path = write_lines(tmp_path, good_row(), good_row())
    with pytest.raises(SettingsError, match="has 2 rows, fewer than one batch of 3: .* --rollout-batch-size 2"):
        check_dataset(path, min_rows=3)


def test_checking_a_dataset_loads_neither_torch_nor_datasets(tmp_path: Path) -> None:
    path = write_lines(tmp_path, good_row())
    script = (
        f"import sys, pathlib; from xrl.data.rows import check_dataset; check_dataset(pathlib.Path({str(path)!r}), "
    )
    script += "min_rows=1); sys.exit(any(name in sys.modules for name in ('torch', 'datasets', 'pyarrow')))"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_values_stay_what_the_file_says(tmp_path: Path) -> None:
    rows = [
        {"prompt": "When?", "ground_truth": "2020-01-01", "extra_info": {"weight": 5}},
        {"prompt": "How much?", "ground_truth": 5, "extra_info": {"weight": 2.5, "only": "here"}},
        {"prompt": "And?", "ground_truth": 2.5},
    ]
    loaded = load_rows(write_lines(tmp_path, *rows))
    assert [row.ground_truth for row in loaded] == ["2020-01-01", "5", "2.5"]
    assert [row.extra for row in loaded] == [{"weight": 5}, {"weight": 2.5, "only": "here"}, {}]


def test_what_is_not_read_may_hold_anything(tmp_path: Path) -> None:
    path = write_lines(tmp_path, good_row(note="half \ud83d"))
    assert len(load_rows(path)) == 1


def test_a_byte_order_mark_and_carriage_returns_are_not_in_the_way(tmp_path: Path) -> None:
    path = write_lines(tmp_path, good_row(), good_row())
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b", ", b",\r ").replace(b"\n", b"\r\n"))
    assert check_dataset(path, min_rows=1) == len(load_rows(path)) == 2
    path.write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(SettingsError, match="is empty"):
        load_rows(path)


# Each means other files, or other places, to somebody who expands it.
ODD_NAMES = ("t[12]", "t*", "t?", "a::b", "{a,b}", "with space", "two\nlines", "~", "%41", "file:x", "\udcff")


@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.parametrize("write", [write_lines, write_parquet])
def test_a_path_is_no_pattern(name: str, write: Any, tmp_path: Path) -> None:
    """Neighbours that the pattern would match are not read."""
    for other in ("t1", "t2", "a", "b", "A"):
        (tmp_path / other).mkdir()
        write(tmp_path / other, good_row(prompt="other"))
    folder = tmp_path / "mine"
    folder.mkdir()
    path = write(folder, good_row(prompt="mine"))
    path = path.rename(folder / (name + path.suffix))
    path = folder.rename(tmp_path / name) / path.name
    assert check_dataset(path, min_rows=1) == 1
    assert [row.prompt for row in load_rows(path)] == ["mine"]


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "data.jsonl")
    with pytest.raises(SettingsError, match=r"data\.jsonl is not a file"):
        check_dataset(tmp_path / "data.jsonl", min_rows=1)


@pytest.mark.parametrize("kind", [pyarrow.float16(), pyarrow.float32(), pyarrow.float64()])
def test_a_ground_truth_of_few_bits_is_the_number_that_was_meant(tmp_path: Path, kind: pyarrow.DataType) -> None:
    truths = pyarrow.array([0.1, 12.5, 3.0], pyarrow.float64()).cast(kind)
    nested = pyarrow.StructArray.from_arrays([truths], names=["ground_truth"])
    for name, column in (("ground_truth", truths), ("reward_model", nested)):
        path = tmp_path / "data.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", "b", "c"], name: column}), path)
        assert [row.ground_truth for row in load_rows(path)] == ["0.1", "12.5", "3.0"]
