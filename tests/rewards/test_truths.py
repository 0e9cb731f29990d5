"""Asking a judge about ground truths before anything starts."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from xrl.config import RewardConfig, SettingsError
from xrl.rewards import create_truth_checker
from xrl.types import Prompt


def check(judge: str, *truths: str) -> None:
    with create_truth_checker(RewardConfig(judge=judge, judge_timeout_s=2.0, judge_num_workers=1)) as checker:
        for number, truth in enumerate(truths, start=1):
            checker.see(f"d.jsonl, line {number}", Prompt(id=number, token_ids=[], text="", ground_truth=truth))


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(
        "import time\n"
        "def reward(response, prompt):\n    return 1.0\n"
        "def check_truth(prompt):\n"
        "    if prompt.ground_truth == 'hang':\n        time.sleep(3600)\n"
        "    if len(prompt.ground_truth) > 4:\n        raise ValueError('it is too long')\n"
        "    int(prompt.ground_truth[0] and None or prompt.ground_truth, *[[]] * (prompt.ground_truth == 'odd'))\n"
    )
    return file


def test_rows_that_a_judge_of_ours_can_use_pass() -> None:
    check("gsm8k", "72", "1,000", r"\frac{1}{2}")
    check("gsm8k-exact", "72")
    check("math-verify", "72", r"\sqrt{2}", "1, 2")


@pytest.mark.parametrize(
    ("judge", "sentence"),
    [
        ("gsm8k", r"d.jsonl, line 2: the ground truth '\\\\sqrt\{7\}' is not a number: try --judge math-verify"),
        ("gsm8k-exact", "d.jsonl, line 2: the ground truth .* is not made of digits alone"),
    ],
)
def test_row_is_refused_by_its_line(judge: str, sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence):
        check(judge, "72", r"\sqrt{7}", "blue")


def test_math_verify_refuses_what_it_cannot_read() -> None:
    with pytest.raises(SettingsError, match="d.jsonl, line 3: math-verify cannot read the ground truth"):
        check("math-verify", "72", r"\sqrt{7}", r"\text{}")


def test_judge_of_the_user_s_own_may_offer_a_check(mine: Path) -> None:
    check(f"{mine}:reward", "1", "22")
    with pytest.raises(SettingsError, match="line 2: it is too long"):
        check(f"{mine}:reward", "1", "55555")


def test_refusal_without_words_still_says_what_is_refused(mine: Path) -> None:
    mine.write_text("def reward(response, prompt):\n    return 1.0\ndef check_truth(prompt):\n    raise ValueError\n")
    with pytest.raises(SettingsError, match="line 1: the judge refuses the ground truth '7'"):
        check(f"{mine}:reward", "7")


def test_check_that_hangs_or_fails_is_bounded_and_named(mine: Path) -> None:
    with pytest.raises(
        SettingsError, match="line 1: the judge could not check .*'hang': time-out: no reward within 2 s"
    ):
        check(f"{mine}:reward", "hang")
    with pytest.raises(SettingsError, match=r"line 1: .*'odd': TypeError: .*mine.py, line 9, in check_truth\)"):
        check(f"{mine}:reward", "odd")


def test_judge_without_a_check_takes_any_row(mine: Path) -> None:
    mine.write_text("def reward(response, prompt):\n    return 1.0\n")
    check(f"{mine}:reward", "blue", "")


def test_row_that_no_judge_s_process_can_be_given_is_refused_by_its_line(mine: Path) -> None:
    for text in ("", "\ndef check_truth(prompt):\n    pass\n"):
        mine.write_text(f"def reward(response, prompt):\n    return 1.0\n{text}")
        with create_truth_checker(RewardConfig(judge=f"{mine}:reward", judge_num_workers=1)) as checker:
            checker.see(
                "d, row 1", Prompt(id=1, token_ids=[], text="", ground_truth="7", extra={"day": date(2024, 1, 2)})
            )
            with pytest.raises(
                SettingsError, match="d, row 2 has an `extra_info` with a complex, which cannot be handed"
            ):
                checker.see("d, row 2", Prompt(id=2, token_ids=[], text="", ground_truth="7", extra={"a": [1j]}))


def test_words_of_a_refusal_are_one_line_that_commands_nothing(mine: Path) -> None:
    mine.write_text(
        "def reward(response, prompt):\n    return 1.0\n"
        "def check_truth(prompt):\n    raise ValueError('\\x1b[2J\\rbad')\n"
    )
    with pytest.raises(SettingsError, match=r"line 1: \\x1b\[2J") as caught:
        check(f"{mine}:reward", "7")
    assert str(caught.value).isprintable()
