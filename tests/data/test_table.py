"""Parquet files as rows, read in a process of its own."""

import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from xrl.data import table
from xrl.data.table import read_table


def write(folder: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    path = folder / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def test_rows_come_in_order_with_the_columns_asked_for(tmp_path: Path) -> None:
    rows = [{"a": number, "b": [{"c": "x" * number}], "d": b"\0"} for number in range(3000)]
    found = list(read_table(write(tmp_path, rows, row_group_size=700), ["b", "a", "absent"]))
    assert found == [{"b": row["b"], "a": row["a"]} for row in rows]
    assert len(list(read_table(write(tmp_path, rows), ["absent"]))) == 3000


def test_reading_may_stop_early(tmp_path: Path) -> None:
    rows = read_table(write(tmp_path, [{"a": "x" * 1000}] * 20_000), ["a"])
    assert next(rows) == {"a": "x" * 1000}
    rows.close()  # type: ignore[attr-defined]


def test_what_datasets_wrote_is_decoded_by_it(tmp_path: Path) -> None:
    """It keeps values of mixed types as JSON text, and says so in the file."""
    datasets = pytest.importorskip("datasets")
    if not hasattr(datasets, "Json"):
        pytest.skip("this version has no such type")
    features = datasets.Features({"a": datasets.Value("string"), "b": datasets.Json()})
    path = tmp_path / "data.parquet"
    rows = [{"a": "x", "b": {"level": 3}}, {"a": "y", "b": {"level": "hard"}}]
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    assert list(read_table(path, ["a", "b"])) == rows


def test_types_of_another_version_of_datasets_are_refused(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist([{"a": "x"}]).replace_schema_metadata(
        {"huggingface": '{"info": {"features": {"a": {"_type": "FromTheFuture"}}}}'}
    )
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(ValueError, match="FromTheFuture"):
        list(read_table(path, ["a"]))


def test_damaged_files_are_one_sentence(tmp_path: Path) -> None:
    path = write(tmp_path, [{"a": "x" * 100 + str(number)} for number in range(2000)], compression="zstd")
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="is not a parquet file that can be read"):
        list(read_table(path, ["a"]))
    path.write_bytes(whole[:100] + bytes(400) + whole[500:])
    with pytest.raises(ValueError, match="cannot be read behind row 0"):
        list(read_table(path, ["a"]))
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        list(read_table(tmp_path / "absent.parquet", ["a"]))


def test_text_that_is_not_utf8_is_one_sentence(tmp_path: Path) -> None:
    text = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xed\xa0")]
    )
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": text}), path)
    with pytest.raises(ValueError, match="cannot be read behind row 0: .*utf"):
        list(read_table(path, ["a"]))


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["x"]), pyarrow.array(["y"])], names=["a", "a"])
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(ValueError, match="has 2 columns called a"):
        list(read_table(path, ["a"]))


def test_modules_of_the_current_folder_are_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, [{"a": 1}])
    for name in ("datasets.py", "pickle.py", "pyarrow.py"):
        (tmp_path / name).write_text("raise RuntimeError('ran')\n")
    monkeypatch.chdir(tmp_path)
    assert list(read_table(path, ["a"])) == [{"a": 1}]
    assert str(tmp_path) not in sys.path


def test_a_reader_that_ends_without_a_word_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import os, sys; print('no\\nmore', file=sys.stderr, flush=True); os.abort()"
    monkeypatch.setattr(table, "module_command", lambda module: [sys.executable, "-c", program])
    with pytest.raises(ValueError, match="cannot be read: its reader was ended by SIGABRT: more$"):
        list(read_table(tmp_path / "data.parquet", ["a"]))


def test_a_reader_that_gives_nothing_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "module_command", lambda module: [sys.executable, "-c", "import time; time.sleep(600)"])
    monkeypatch.setattr(table, "LIMIT_S", 0.2)
    with pytest.raises(ValueError, match="SIGKILL: it gave no rows for 0.2 s"):
        list(read_table(tmp_path / "data.parquet", ["a"]))
