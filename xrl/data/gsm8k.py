"""GSM8K (Cobbe et al., arXiv:2110.14168) into prompt rows with checkable answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from xrl.config import SettingsError
from xrl.config.errors import unreadable_files_refused
from xrl.data.table import read_table
from xrl.data.text import check_text, numbered_lines, parse_json_object
from xrl.files.disk import NotWritten
from xrl.files.whole import write_whole

SPLITS = ("train", "test")
INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'
MAX_REPORTED_ROWS = 5
_SHARD = re.compile(r"-of-([0-9]+)\.parquet$")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)")


@unreadable_files_refused()
def convert(input_dir: Path, out_dir: Path, *, overwrite: bool = False) -> dict[str, int]:
    """Write `train.jsonl` and `test.jsonl` below out_dir; each is whole or not there.

    Args:
        input_dir: the hub's layout (parquet files, in `main/` or directly) or the original one (`train.jsonl`,
            `test.jsonl`); one split is enough.
        overwrite: replace output files with other content than what would be written.

    Returns:
        rows written of each split found

    Raises:
        SettingsError: no input, files missing of it, bad rows (the first five are named; nothing is written), an output
            in the way, a folder that cannot be made, or a disk that is full.
    """
    files = {split: found for split in SPLITS if (found := _find_split(input_dir, split))}
    if not files:
        raise SettingsError(
            f"--input-dir {input_dir} holds no GSM8K: needs main/train-*.parquet, train-*.parquet or train.jsonl "
            f"(and the same for test)"
        )
    contents = _convert_splits(files)
    for split, rows in contents.items():
        _check_output(out_dir / f"{split}.jsonl", _as_bytes(rows), overwrite=overwrite)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"--out-dir {out_dir} cannot be made a folder: {error.strerror}") from error
    for split, rows in contents.items():
        try:
            write_whole(out_dir / f"{split}.jsonl", _as_bytes(rows))
        except NotWritten as error:
            raise SettingsError(str(error)) from error
    return {split: len(rows) for split, rows in contents.items()}


def convert_row(question: str, answer: str, *, split: str, index: int) -> dict[str, Any]:
    """One prompt row.

    Raises:
        ValueError: the answer does not end in `#### <number>`.
    """
    _, marker, final = answer.rpartition("####")
    ground_truth = final.strip().replace(",", "")
    if not marker or not _NUMBER.fullmatch(ground_truth):
        raise ValueError("a row whose `answer` does not end in `#### <number>`")
    return {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": f"{question} {INSTRUCTION}"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": ground_truth},
        "extra_info": {"split": split, "index": index, "answer": answer, "question": question},
    }


def _find_split(input_dir: Path, split: str) -> list[Path]:
    for folder, pattern in (("main", f"{split}-*.parquet"), (".", f"{split}-*.parquet"), (".", f"{split}.jsonl")):
        if found := sorted(path for path in (input_dir / folder).glob(pattern) if path.is_file()):
            _check_whole(found)
            return found
    return []


def _check_whole(files: list[Path]) -> None:
    """Refuse a split of which files are missing: `train-00000-of-00002.parquet` says that there are two."""
    totals = {int(match[1]) for file in files if (match := _SHARD.search(file.name))}
    if totals and totals != {len(files)}:
        raise SettingsError(
            f"{files[0].parent} has {len(files)} of the {max(totals)} files of its split ({files[0].name}): give all "
            f"of them, and no others"
        )


def _convert_splits(files: dict[str, list[Path]]) -> dict[str, list[str]]:
    """Each split's rows as JSON."""
    contents: dict[str, list[str]] = {}
    problems: list[str] = []
    for split, paths in files.items():
        rows: list[str] = []
        for location, source in tqdm(list(_read_sources(paths)), desc=f"converting {split}", unit="row", disable=None):
            try:
                question, answer = _question_and_answer(source)
                row = convert_row(question, answer, split=split, index=len(rows))
            except ValueError as error:
                problems.append(f"{location} is {error}")
                continue
            rows.append(json.dumps(row, ensure_ascii=False))
        contents[split] = rows
    if problems:
        more = f"; and {len(problems) - MAX_REPORTED_ROWS} more" if len(problems) > MAX_REPORTED_ROWS else ""
        raise SettingsError(f"nothing was written: {'; '.join(problems[:MAX_REPORTED_ROWS])}{more}")
    empty = [str(path) for split, rows in contents.items() if not rows for path in files[split]]
    if empty:
        raise SettingsError(f"{', '.join(empty)} is empty: needs rows with `question` and `answer`")
    return contents


def _read_sources(paths: list[Path]) -> Iterator[tuple[str, bytes | dict[str, Any]]]:
    """Rows with the location that names them: JSON lines unparsed, parquet rows as dictionaries."""
    for path in paths:
        if path.suffix == ".jsonl":
            for number, line in numbered_lines(path):
                yield f"{path}, line {number}", line
            continue
        try:
            for number, row in enumerate(read_table(path, ("question", "answer")), start=1):
                yield f"{path}, row {number}", row
        except ValueError as error:
            raise SettingsError(f"{path} {error}") from error


def _question_and_answer(source: bytes | dict[str, Any]) -> tuple[str, str]:
    row = parse_json_object(source) if isinstance(source, bytes) else source
    for name in ("question", "answer"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise ValueError(f"a row without `{name}`")
        try:
            check_text(row[name])
        except ValueError as error:
            raise ValueError(f"a row whose `{name}` has {error}") from error
    return row["question"], row["answer"]


def _as_bytes(rows: list[str]) -> bytes:
    return "".join(f"{row}\n" for row in rows).encode()


def _check_output(path: Path, content: bytes, *, overwrite: bool) -> None:
    if path.exists() and not path.is_file():
        raise SettingsError(f"{path} is in the way and is not a file: give another --out-dir")
    if path.exists() and not overwrite and path.read_bytes() != content:
        raise SettingsError(f"{path} exists with other content: give another --out-dir, or --overwrite to replace it")
