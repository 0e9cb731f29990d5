"""Settings that are written down mean the same in another folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from xrl.config.parse import dump_settings, parse_settings
from xrl.config.paths import absolute_paths


def test_every_path_is_written_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--model", "model", "--data", "../rows.jsonl", "--eval-data", "held/out.jsonl", "--work-dir", "runs"]
    flags += ["--rollout-python", sys.executable, "--judge", "judges/mine.py:reward"]
    settings = absolute_paths(parse_settings(flags))
    assert settings.model.model == tmp_path / "model"
    assert settings.data.data.is_absolute()
    assert settings.data.data.resolve() == (tmp_path.parent / "rows.jsonl").resolve()
    assert settings.evaluation.eval_data == tmp_path / "held" / "out.jsonl"
    assert settings.run.work_dir == tmp_path / "runs"
    assert settings.rollout.rollout_python == Path(sys.executable)  # a link of a virtual environment stays one
    assert settings.rewards.judge == f"{tmp_path / 'judges' / 'mine.py'}:reward"


def test_settings_written_down_are_read_alike_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    settings = absolute_paths(parse_settings(["--model", "m", "--data", "d.jsonl", "--judge", "mine.py:reward"]))
    (tmp_path / "config.yaml").write_text(dump_settings(settings))
    monkeypatch.chdir(tmp_path)
    again = parse_settings(["--config", "config.yaml"])
    assert again == settings == absolute_paths(again)
    assert again.data.data == tmp_path / "here" / "d.jsonl"


@pytest.mark.parametrize("judge", ["gsm8k", "package.module:reward", "math-verify"])
def test_names_that_are_no_files_stay(judge: str) -> None:
    settings = parse_settings(["--model", "m", "--data", "d", "--judge", judge])
    assert absolute_paths(settings).rewards.judge == judge


def test_home_of_a_judge_is_written_out() -> None:
    settings = parse_settings(["--model", "m", "--data", "d", "--judge", "~/mine.py:reward"])
    assert absolute_paths(settings).rewards.judge == f"{Path.home() / 'mine.py'}:reward"
