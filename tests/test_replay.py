"""What `xrl replay` needs, and what it says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.small_runs import run_flags
from xrl.config import SettingsError
from xrl.config.parse import dump_settings, parse_settings
from xrl.replay import Difference, replay, report


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Of a run that has logged two steps, and neither recorded samples nor saved a state."""
    settings = parse_settings(run_flags(tmp_path / "model", tmp_path / "train.jsonl", tmp_path))
    (tmp_path / "config.yaml").write_text(dump_settings(settings))
    rows = [{"step": 0, "eval/pass@1": 0.5}, {"step": 1, "updates": 1.0}, {"step": 2, "updates": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_what_is_missing_is_said(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"metrics.jsonl has no row of an update at step 3"):
        replay(run_dir, 3)
    with pytest.raises(SettingsError, match=r"step-2.safetensors is missing: a run records samples with --record-samp"):
        replay(run_dir, 2)
    (run_dir / "samples").mkdir()
    (run_dir / "samples" / "step-2.safetensors").write_bytes(b"")
    with pytest.raises(SettingsError, match=r"state.step-1 is missing: step 2 learned from there \(--state-interval 1"):
        replay(run_dir, 2)
    with pytest.raises(SettingsError, match="RUN_DIR .* is no run's folder"):
        replay(tmp_path / "elsewhere", 1)


def test_only_what_differs_is_told_the_largest_difference_first(capsys: pytest.CaptureFixture[str]) -> None:
    same = [
        Difference(name="lr", logged=0.1, found=0.1),
        Difference(name="kl", logged=math.nan, found=math.nan),
    ]
    assert report(same)
    assert capsys.readouterr().out == "2 of 2 metrics are equal to the bit\n"
    others = [
        Difference(name="loss", logged=1.0, found=1.5),
        Difference(name="grad_norm", logged=1.0, found=3.0),
    ]
    assert not report([*same, *others])
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "grad_norm: 3.0, logged 1.0 (2.0e+00 of it)",
        "loss: 1.5, logged 1.0 (5.0e-01 of it)",
        "2 of 4 metrics are equal to the bit",
    ]
