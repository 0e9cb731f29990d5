"""Asking a judge in the caller's thread."""

from fractions import Fraction

import numpy as np
import pytest

from xrl.rewards.judge import InlineJudge, ask
from xrl.types import Prompt

PROMPT = Prompt(id=0, token_ids=[1], text="?", ground_truth="72")


@pytest.mark.parametrize("reward", [1, 1.0, True, np.float32(1), np.True_, Fraction(1)])
def test_any_number_is_a_reward(reward: object) -> None:
    verdict = ask(lambda response, prompt: reward, "x", PROMPT)  # type: ignore[arg-type, return-value]
    assert (verdict.reward, type(verdict.reward), verdict.failed) == (1.0, float, False)


@pytest.mark.parametrize("reward", [None, "1", float("nan"), float("inf"), [1.0], np.zeros(2)])
def test_anything_else_is_a_failure(reward: object) -> None:
    verdict = ask(lambda response, prompt: reward, "x", PROMPT)  # type: ignore[arg-type, return-value]
    assert (verdict.reward, verdict.failed) == (0.0, True)


def test_inline_judge_counts_what_fails() -> None:
    def sometimes(response: str, prompt: Prompt) -> float:
        return 1 / len(response)

    pool = InlineJudge(sometimes)
    futures = [pool.submit(response, PROMPT) for response in ("xx", "", "")]
    assert [future.result(0).reward for future in futures] == [0.5, 0.0, 0.0]
    assert (pool.num_judged, pool.num_failed, pool.failures) == (3, 2, {"ZeroDivisionError": 2})
    pool.close()
