"""The demo and the example settings, as a newcomer runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from xrl.config.parse import parse_settings

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def run_demo(work_dir: Path, layout: str, *flags: str) -> list[str]:
    """Lines that a short demo prints."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "XRL_"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        inherited.pop(name, None)
    command = [sys.executable, "examples/demo.py", "--layout", layout, "--work-dir", str(work_dir), "--"]
    command += ["--num-rollouts", "2", "--eval-max-prompts", "16", "--eval-interval", "1", *flags]
    done = subprocess.run(command, cwd=ROOT, env=inherited, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_example_settings_are_accepted(config: Path) -> None:
    settings = parse_settings(["--config", str(config)])
    assert settings.evaluation.eval_data is not None


@pytest.mark.parametrize("layout", ["tp2pp2", "tp2pp2dp2"])
def test_demo_layouts_differ_only_in_how_the_model_is_spread(layout: str) -> None:
    single = parse_settings(["--config", str(ROOT / "configs" / "demo_single.yaml")])
    spread = parse_settings(["--config", str(ROOT / "configs" / f"demo_{layout}.yaml")])
    for section in ("model", "data", "optimizer", "algorithm", "rewards", "rollout", "evaluation", "run"):
        assert getattr(single, section) == getattr(spread, section)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        "single",
        pytest.param("tp2pp2", marks=pytest.mark.distributed),
        pytest.param("tp2pp2dp2", marks=pytest.mark.distributed),
    ],
)
def test_demo_ends_with_its_figures_and_a_model_that_loads(tmp_path: Path, layout: str) -> None:
    lines = run_demo(tmp_path, layout)
    figures = json.loads(lines[-1])
    assert figures.keys() == {"pass_rate_before", "pass_rate_after", "train_seconds", "hf_final"}
    assert 0 < figures["pass_rate_before"] < 1
    assert any("greedy" in line for line in lines)

    folder = Path(figures["hf_final"])
    assert (folder.parent / "reward_curve.png").stat().st_size > 0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trained = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    student = AutoModelForCausalLM.from_pretrained(ROOT / "examples" / "student", dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode("Tom has 3 eggs.")])
    with torch.no_grad():
        change = (trained(ids).logits - student(ids).logits).abs().max().item()
    assert 1e-6 < change < 5, "two small updates must change the model, and not break it"


@pytest.mark.slow
def test_demo_fails_as_training_fails(tmp_path: Path) -> None:
    command = [sys.executable, "examples/demo.py", "--work-dir", str(tmp_path), "--", "--lr", "-1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "--lr" in done.stderr
    assert "Traceback" not in done.stderr
