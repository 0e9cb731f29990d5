"""The `xrl` command: what it knows, and how it refuses what it does not."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import xrl
from xrl.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parents[1]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr with which a command line is refused."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("xrl: error: ")
    return line


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_command(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    main(arguments)
    listed = capsys.readouterr().out
    assert all(f"\n  {command} " in listed for command in COMMANDS)


def test_unknown_command_gets_the_nearest_and_all(capsys: pytest.CaptureFixture[str]) -> None:
    known = "known are: train, gsm8k, convert, worker, replay, doctor, version, help"
    assert refusal(capsys, "trian").endswith(f"unknown command 'trian'; the nearest is train, {known}")
    assert refusal(capsys, "help", "convrt").endswith(f"unknown command 'convrt'; the nearest is convert, {known}")
    assert refusal(capsys, "zzzz").endswith(f"unknown command 'zzzz', {known}")


@pytest.mark.parametrize("word", ["configs/demo_single.yaml", "--config", "--nproc-per-node"])
def test_flags_and_files_before_a_command_are_told_where_they_go(capsys: pytest.CaptureFixture[str], word: str) -> None:
    assert f"{word} is no command" in refusal(capsys, word, "4")


@pytest.mark.parametrize("word", ["version", "--version", "-V"])
def test_version_is_printed(capsys: pytest.CaptureFixture[str], word: str) -> None:
    main([word])
    assert capsys.readouterr().out == f"{xrl.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_each_command(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with contextlib.suppress(SystemExit):
        main(["help", command])
    assert capsys.readouterr().out.startswith(f"usage: xrl {'COMMAND' if command in ('version', 'help') else command}")


def test_help_of_train_tells_how_many_ranks_start(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    assert "--nproc-per-node N" in capsys.readouterr().out


@pytest.mark.parametrize("number", ["0", "two", "-1", "", "\u00b2", "9" * 5000])
def test_number_of_ranks_must_be_whole_and_positive(capsys: pytest.CaptureFixture[str], number: str) -> None:
    sentence = refusal(capsys, "train", f"--nproc-per-node={number}")
    assert sentence.endswith(f"--nproc-per-node needs a whole number >= 1, found {number!r}")


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["worker", "--modle", "x"], "--model"),
        (["convert", "--form=x"], "--from"),
        (["gsm8k", "--inputs-dir", "x"], "--input-dir"),
    ],
    ids=" ".join,
)
def test_misspelt_flag_is_named_before_the_one_that_is_missing_for_it(
    capsys: pytest.CaptureFixture[str], words: list[str], near: str
) -> None:
    flag = words[1].partition("=")[0]
    assert f"flag {flag} is unknown; the nearest is {near} (" in refusal(capsys, *words)


def test_missing_settings_of_train_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--model is missing" in refusal(capsys, "train", "--nproc-per-node", "2")


def test_gsm8k_writes_rows(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    row = {"question": "Two and three?", "answer": "2+3=5\n#### 5"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    main(["gsm8k", "--input-dir", str(tmp_path), "--out-dir", str(tmp_path / "rows")])
    assert capsys.readouterr().out == f"{tmp_path}/rows/train.jsonl: 1 rows\n"
    assert json.loads((tmp_path / "rows" / "train.jsonl").read_text())["reward_model"]["ground_truth"] == "5"


def test_bad_arguments_of_gsm8k_are_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "--input-dir" in refusal(capsys, "gsm8k")
    assert "--shuffle" in refusal(capsys, "gsm8k", "--input-dir", str(tmp_path), "--shuffle")
    assert f"--input-dir {tmp_path} holds no GSM8K" in refusal(capsys, "gsm8k", "--input-dir", str(tmp_path))


def test_bad_arguments_of_doctor_are_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "required: RUN_DIR" in refusal(capsys, "doctor")
    assert f"RUN_DIR {tmp_path} is no run's folder: it has no config.yaml" in refusal(capsys, "doctor", str(tmp_path))


def test_bad_arguments_of_worker_are_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "required: --model, --max-model-len" in refusal(capsys, "worker")
    needed = ["worker", "--max-model-len", "8", "--model"]
    assert f"--model {tmp_path} has no config.json" in refusal(capsys, *needed, str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert "--shuffle" in refusal(capsys, *needed, str(tmp_path), "--shuffle")
    assert "--engine 'vllm' is unknown" in refusal(capsys, *needed, str(tmp_path), "--engine", "vllm")
    assert "--num-threads must be >= 1, got 0" in refusal(capsys, *needed, str(tmp_path), "--num-threads", "0")
    assert "--port must be in [0, 65535], got 70000" in refusal(capsys, *needed, str(tmp_path), "--port", "70000")


@pytest.mark.parametrize(
    "command",
    [["--help"], ["train", "--help"], ["train", "--help-all"], ["gsm8k", "--help"], ["worker", "--help"]],
    ids=" ".join,
)
def test_help_imports_no_torch(command: list[str]) -> None:
    program = (
        "import atexit, sys; from xrl.cli import main;"
        "atexit.register(lambda: sys.stderr.write(str('torch' in sys.modules)));"
        "main(sys.argv[1:])"
    )
    found = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0 and found.stderr == "False"
