"""Pass rates: what is asked for them, and what they are of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from tests.samples import answer, judged, prompt
from xrl.config import EvaluationConfig
from xrl.rollout.collect import Collected
from xrl.rollout.evaluate import Evaluator
from xrl.rollout.fleet import RolloutCounts
from xrl.types import Completion, FinishReason, Group, Prompt, SamplingParams

TRAINING = SamplingParams(temperature=0.6, top_k=20, top_p=0.9, max_new_tokens=32, stop_token_ids=(2, 3), seed=1234)
PROMPTS = [prompt(10 + number, id=number) for number in range(3)]
Judged = tuple[float | None, FinishReason]


class Answers:
    """In the place of the collector: rewards by prompt, first the greedy one, then those that were sampled."""

    def __init__(self, *rewards: Sequence[float | Judged | None]) -> None:
        """
        Args:
            rewards: of each prompt, None in its first place where nobody could answer it; a reward may come with how
                its answer ended.
        """
        self.rewards = rewards
        self.calls: list[dict[str, Any]] = []

    def collect(self, prompts: Sequence[Prompt], **call: Any) -> Collected:
        self.calls.append({"ids": [each.id for each in prompts], **call})
        is_greedy = call["num_samples"] == 1 and call["sampling"].temperature == 0
        groups = []
        for each, found in zip(prompts, self.rewards, strict=False):
            chosen = found[:1] if is_greedy else found[1 : 1 + call["num_samples"]]
            if chosen:
                groups.append(Group(rollouts=tuple(self._rollout(each, one) for one in chosen)))
        return Collected(groups=groups, counts=RolloutCounts(), seconds=1.0, num_tokens=0)

    @staticmethod
    def _rollout(asked: Prompt, found: float | Judged | None) -> Any:
        reward, reason = found if isinstance(found, tuple) else (found, "stop")
        completion: Completion = answer(4, reason=reason)
        return judged(asked, completion, reward)


def evaluated(*rewards: Sequence[float | Judged | None], **settings: Any) -> tuple[dict[str, float], Answers]:
    answers = Answers(*rewards)
    config = EvaluationConfig(**{"eval_samples_per_prompt": 2, **settings})
    return Evaluator(answers, PROMPTS, config, TRAINING).evaluate(), answers  # type: ignore[arg-type]


def test_greedy_answers_are_asked_for_first_then_those_that_are_sampled() -> None:
    _, answers = evaluated([1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 1.0, 1.0], eval_temperature=0.8)
    kept = {"max_new_tokens": 32, "stop_token_ids": (2, 3), "seed": 1234}
    assert answers.calls == [
        {
            "ids": [0, 1, 2],
            "sampling": SamplingParams(temperature=0.0, top_k=0, top_p=1.0, **kept),
            "num_samples": 1,
            "description": "greedy evaluation",
        },
        {
            "ids": [0, 1, 2],
            "sampling": SamplingParams(temperature=0.8, top_k=0, top_p=1.0, **kept),
            "num_samples": 2,
            "description": "sampled evaluation",
        },
    ]


def test_every_evaluation_asks_the_same_prompts_with_the_same_seeds() -> None:
    answers = Answers([1.0, 1.0])
    evaluator = Evaluator(
        answers,  # type: ignore[arg-type]
        PROMPTS,
        EvaluationConfig(eval_max_prompts=1, eval_samples_per_prompt=1),
        TRAINING,
    )
    first, second = evaluator.evaluate(), evaluator.evaluate()
    assert first == second
    assert answers.calls[:2] == answers.calls[2:]
    assert answers.calls[0]["ids"] == [0]


def test_rates_are_shares_of_prompts_answered_rightly() -> None:
    found, _ = evaluated([1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0])
    assert found == {
        "eval/greedy": pytest.approx(2 / 3),
        "eval/pass@1": 0.5,  # of three: 1/2, 0 and 1
        "eval/pass@2": pytest.approx(2 / 3),
        "eval/prompts": 3.0,
        "eval/greedy/prompts": 3.0,
        "eval/pass@1/prompts": 3.0,
        "eval/pass@2/prompts": 3.0,
    }


def test_one_sampled_answer_a_prompt_gives_one_rate() -> None:
    found, _ = evaluated([0.0, 1.0], [0.0, 0.0], [0.0, 0.0], eval_samples_per_prompt=1)
    assert list(found) == ["eval/greedy", "eval/pass@1", "eval/prompts", "eval/greedy/prompts", "eval/pass@1/prompts"]
    assert found["eval/pass@1"] == pytest.approx(1 / 3)


def test_what_was_not_answered_or_not_judged_is_in_no_rate_and_told_of(caplog: pytest.LogCaptureFixture) -> None:
    # The first prompt has one judged answer, the second two, and nobody could answer the third.
    found, _ = evaluated([0.0, 0.0, None], [1.0, 1.0, 1.0], [])
    assert found == {
        "eval/greedy": 0.5,  # of two
        "eval/pass@1": 0.5,
        "eval/pass@2": 1.0,  # of one
        "eval/prompts": 3.0,
        "eval/greedy/prompts": 2.0,
        "eval/pass@1/prompts": 2.0,
        "eval/pass@2/prompts": 1.0,
    }
    assert "greedy evaluation: 1 of 3 prompts failed, and 0 answers were cut off" in caplog.text
    assert "sampled evaluation: 1 of 3 prompts failed, and 1 answers were cut off" in caplog.text


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_an_answer_that_was_cut_off_is_not_wrong(reason: FinishReason, caplog: pytest.LogCaptureFixture) -> None:
    found, _ = evaluated([1.0, (0.0, reason), 1.0], eval_max_prompts=1)
    assert (found["eval/pass@1"], found["eval/pass@1/prompts"]) == (1.0, 1.0)
    assert math.isnan(found["eval/pass@2"]) and found["eval/pass@2/prompts"] == 0.0
    assert "sampled evaluation: 0 of 1 prompts failed, and 1 answers were cut off" in caplog.text


def test_an_answer_at_its_longest_counts_by_its_reward() -> None:
    found, _ = evaluated([(1.0, "length"), (1.0, "length"), (0.0, "length")], eval_max_prompts=1)
    assert (found["eval/greedy"], found["eval/pass@1"], found["eval/pass@2"]) == (1.0, 0.5, 1.0)


def test_nobody_is_told_of_an_evaluation_in_which_everything_was_judged(caplog: pytest.LogCaptureFixture) -> None:
    evaluated([1.0, 1.0, 0.0], eval_max_prompts=1)
    assert not caplog.records


def test_rates_of_nothing_are_no_numbers() -> None:
    found, _ = evaluated([], [], [])
    assert all(math.isnan(found[name]) for name in ("eval/greedy", "eval/pass@1", "eval/pass@2"))
    assert found["eval/prompts"] == 3.0 and found["eval/greedy/prompts"] == 0.0
