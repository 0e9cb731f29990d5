"""Judges by name, by dotted path and by file."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from xrl.config import RewardConfig, SettingsError
from xrl.rewards import JUDGES, check_judge, create_judge, create_truth_checker
from xrl.types import Prompt

ODD_JUDGES = Path(__file__).with_name("odd_judges.py")
CUSTOM_REWARD = Path(__file__).parents[2] / "examples" / "custom_reward.py"
PROMPT = Prompt(id=0, token_ids=[1], text="?", ground_truth="72")


@pytest.mark.parametrize("name", JUDGES)
def test_every_judge_of_the_table_rewards_the_right_answer(name: str) -> None:
    check_judge(name)
    pool = create_judge(RewardConfig(judge=name, judge_num_workers=1, judge_timeout_s=60))
    rewards = [pool.submit(response, PROMPT).result(60).reward for response in ("#### 72", "#### 71")]
    pool.close()
    assert rewards == [1.0, 0.0]


def test_file_s_function_is_a_judge() -> None:
    pool = create_judge(RewardConfig(judge=f"{CUSTOM_REWARD}:reward", judge_num_workers=1, judge_timeout_s=60))
    rewards = [pool.submit(text, PROMPT).result(60).reward for text in ("#### 72", "a" * 400 + "#### 72", "no")]
    pool.close()
    assert rewards == [1.0, 0.8, 0.0]


def test_module_s_function_is_a_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards").mkdir()
    (tmp_path / "my_rewards" / "brevity.py").write_text("def judge(response, prompt):\n    return 1 / len(response)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    pool = create_judge(RewardConfig(judge="my_rewards.brevity:judge", judge_num_workers=1, judge_timeout_s=60))
    assert pool.submit("four", PROMPT).result(60).reward == 0.25
    pool.close()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gsm9k", r"gsm9k is unknown \(the nearest is gsm8k\): take one of gsm8k, gsm8k-exact, math-verify, or"),
        ("no_such_file.py:judge", "no file no_such_file.py"),
        (f"{ODD_JUDGES}:", "must be package.module:function or path/file.py:function"),
    ],
)
def test_judge_that_is_not_there_is_refused_by_name(name: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        check_judge(name)


def start(judge: str) -> None:
    with create_truth_checker(RewardConfig(judge=judge, judge_num_workers=1)):
        pass


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:judge", "cannot import no_such_module: ModuleNotFoundError"),
        (f"{ODD_JUDGES}:absent", "has no function 'absent'"),
        (f"{ODD_JUDGES}:NOT_A_FUNCTION", "NOT_A_FUNCTION in .* is a int, not a function"),
    ],
)
def test_judge_that_cannot_be_started_is_refused_by_name(name: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        start(name)


def test_file_that_cannot_be_imported_says_why(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def judge(:\n")
    with pytest.raises(SettingsError, match="cannot import .*broken.py: SyntaxError.*line 1"):
        start(f"{tmp_path / 'broken.py'}:judge")


@pytest.mark.parametrize("statement", ["import no_such_package", "1 / 0", "raise SystemExit(3)"])
def test_file_that_fails_at_import_names_its_line(tmp_path: Path, statement: str) -> None:
    (tmp_path / "failing.py").write_text(f"import json\n{statement}\n")
    with pytest.raises(SettingsError, match=r"failing.py, line 2\)$"):
        start(f"{tmp_path / 'failing.py'}:judge")


def test_file_of_a_judge_is_not_run_in_this_process(tmp_path: Path) -> None:
    (tmp_path / "notes.py").write_text(
        "import os, pathlib\n"
        "pathlib.Path(__file__).with_name('pid').write_text(str(os.getpid()))\n"
        "def judge(response, prompt):\n    return 1\n"
    )
    reference = f"{tmp_path / 'notes.py'}:judge"
    check_judge(reference)
    create_judge(RewardConfig(judge=reference)).close()
    assert not (tmp_path / "pid").exists()
    start(reference)
    assert (tmp_path / "pid").read_text() != str(os.getpid())


def test_checking_a_judge_loads_neither_torch_nor_sympy() -> None:
    script = "import sys; from xrl.rewards import check_judge; check_judge('math-verify'); "
    script += "sys.exit(any(name in sys.modules for name in ('torch', 'sympy', 'numpy')))"
    subprocess.run([sys.executable, "-c", script], check=True)
