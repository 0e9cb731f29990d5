"""Asking a judge in the caller's thread."""

import json
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from xrl.rewards.gsm8k import judge as gsm8k
from xrl.rewards.judge import InlineJudge, ask
from xrl.types import Prompt

PROMPT = Prompt(id=0, token_ids=[1], text="?", ground_truth="72")


@pytest.mark.parametrize("reward", [1, 1.0, True, np.float32(1), np.True_, Fraction(1)])
def test_any_number_is_a_reward(reward: object) -> None:
    verdict = ask(lambda response, prompt: reward, "x", PROMPT)  # type: ignore[arg-type, return-value]
    assert (verdict.reward, type(verdict.reward), verdict.failed) == (1.0, float, False)


class Odd:
    def __float__(self) -> float:
        raise LookupError("no value")

    def __repr__(self) -> str:
        raise LookupError("no words")


@pytest.mark.parametrize(
    "reward",
    [None, "1", float("nan"), float("-inf"), [1.0], np.zeros(2), 10**400, {"score": 1}, 1j]
    + [1e308, -1.1e6, 10**7, np.str_("1"), np.complex64(1), np.complex128(1), [Odd(), 10**5000]],
)
def test_anything_else_is_no_reward_and_names_the_function(reward: object) -> None:
    verdict = ask(lambda response, prompt: reward, "x", PROMPT)  # type: ignore[arg-type, return-value]
    assert (verdict.reward, verdict.failed) == (None, True)
    assert re.search(r"tests/rewards/test_judge.py, line \d+, in <lambda>\)$", verdict.error)


def test_error_names_the_line_of_the_user_s_own_file_also_where_a_library_raised_it() -> None:
    def divides(response: str, prompt: Prompt) -> float:
        return 1 / 0

    def parses(response: str, prompt: Prompt) -> float:
        return float(json.loads(response))

    line = divides.__code__.co_firstlineno
    file = "tests/rewards/test_judge.py"
    error = ask(divides, "{", PROMPT).error
    assert re.fullmatch(rf"ZeroDivisionError: division by zero \(.*{file}, line {line + 1}, in divides\)", error)
    assert re.search(rf"{file}, line {line + 4}, in parses\)$", ask(parses, "{", PROMPT).error)


def test_reward_that_cannot_be_looked_at_fails_one_answer() -> None:
    verdict = ask(lambda response, prompt: Odd(), "x", PROMPT)  # type: ignore[arg-type, return-value]
    assert re.search(r"^LookupError: no value \(.*test_judge.py, line \d+, in __float__\)$", verdict.error)


def test_place_is_said_also_from_a_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "test_judge.py, line " in ask(lambda response, prompt: 1 / 0, "x", PROMPT).error


def test_judge_of_ours_that_fails_shows_nothing_of_our_insides() -> None:
    verdict = ask(gsm8k, "#### 1", Prompt(id=0, token_ids=[1], text="?", ground_truth="blue"))
    assert verdict.error == "ValueError: the ground truth 'blue' is not a number: try --judge math-verify"


def test_exception_that_cannot_say_what_it_is_fails_one_answer() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise ValueError

    def mute(response: str, prompt: Prompt) -> float:
        raise Mute

    assert ask(mute, "x", PROMPT).failure == "Mute"


def test_inline_judge_counts_what_fails() -> None:
    def sometimes(response: str, prompt: Prompt) -> float:
        return 1 / len(response)

    pool = InlineJudge(sometimes)
    futures = [pool.submit(response, PROMPT) for response in ("xx", "", "")]
    assert [future.result(0).reward for future in futures] == [0.5, None, None]
    assert (pool.num_judged, pool.num_failed, pool.failures) == (3, 2, {"ZeroDivisionError": 2})
    pool.close()


def test_failed_judge_s_reward_is_zero_where_that_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    pool = InlineJudge(lambda response, prompt: None, failed_reward=0.0)
    verdict = pool.submit("x", PROMPT).result(0)
    assert (verdict.reward, verdict.failure, pool.num_failed) == (0.0, "None", 1)
    assert "the answer gets reward 0 " in caplog.text
