"""Python children find the modules that were meant, whatever the current folder holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from xrl.launch.children import module_command

ROOT = Path(__file__).resolve().parents[2]
SHADOWS = ["queue.py", "logging.py", "random.py", "types.py", "json/__init__.py", "datasets/__init__.py", "xrl.py"]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a user's project with names of our own, of Python's and of what we import."""
    for name in SHADOWS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"raise ImportError('the user\\'s own {name}')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def test_current_folder_hides_no_module(project: Path) -> None:
    found = subprocess.run([*module_command("xrl.rollout.worker"), "--help"], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_python_path_still_counts(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (project / "mine").mkdir()
    (project / "mine" / "theirs.py").write_text("print('found')")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{project / 'mine'}")
    found = subprocess.run(module_command("theirs"), capture_output=True, text=True)
    assert found.stdout == "found\n"


def test_another_environments_python_is_asked(project: Path) -> None:
    assert module_command("a.b", python=Path("/other/bin/python")) == ["/other/bin/python", "-u", "-P", "-m", "a.b"]


def test_xrl_that_is_run_from_where_it_lies_is_found_there_by_its_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert module_command("xrl.rollout.worker") == [sys.executable, "-u", "-m", "xrl.rollout.worker"]


def test_module_started_by_a_launcher_leaves_the_current_folder_too(project: Path) -> None:
    # Python itself imports types on its way to any module: that name nobody can save.
    (project / "types.py").unlink()
    (project / "xrl.py").unlink()
    found = subprocess.run(
        [sys.executable, "-m", "xrl.train", "--model", "nowhere", "--data", "nothing"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (found.returncode, found.stderr.count("\n")) == (2, 1), found.stderr
    assert "nowhere does not exist" in found.stderr
