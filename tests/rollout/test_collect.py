"""Collecting, scoring and evaluating with a judge that fails."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from xrl.algorithms.advantages import group_advantages
from xrl.algorithms.scoring import score_groups
from xrl.config import EvaluationConfig
from xrl.launch.exit import RunEnded
from xrl.rewards.judge import InlineJudge
from xrl.rollout.collect import Collected, Collector
from xrl.rollout.evaluate import Evaluator
from xrl.rollout.pool import RolloutCounts
from xrl.trainer import refuse_useless
from xrl.types import Completion, GenerateRequest, Prompt, SamplingParams

NO_ANSWER = 99  # the first token of a prompt that no worker can answer


class Workers:
    """Answers a prompt with its own tokens and the number of the sample."""

    def generate(
        self, requests: list[GenerateRequest], counts: RolloutCounts
    ) -> Iterator[tuple[int, list[Completion] | None]]:
        for number, request in enumerate(requests):
            if request.token_ids[0] == NO_ANSWER:
                counts.failed += 1
                counts.why_failed = "rollout worker 0 (10.0.0.2:80): out of memory"
                yield number, None
                continue
            counts.finished += 1
            yield (
                number,
                [
                    Completion(
                        token_ids=[*request.token_ids, sample],
                        logprobs=[-0.5] * (len(request.token_ids) + 1),
                        finish_reason="stop",
                        weights_version=0,
                    )
                    for sample in range(request.num_samples)
                ],
            )


class Words:
    """A tokenizer whose tokens are their numbers."""

    def decode(self, token_ids: list[int], **_: Any) -> str:
        return " ".join(map(str, token_ids))


def fails_in_a_third(response: str, prompt: Prompt) -> float:
    sample = int(response.split()[-1])
    return 1.0 / (sample % 3 - 1) if sample % 3 == 1 else float(sample % 2)


def collector(judge: Any, *, failed_reward: float | None = None) -> Collector:
    return Collector(Workers(), Words(), InlineJudge(judge, failed_reward=failed_reward))  # type: ignore[arg-type]


def prompts(*first_tokens: int) -> list[Prompt]:
    return [Prompt(id=n, token_ids=[t], text="?", ground_truth="1") for n, t in enumerate(first_tokens)]


def collect(judge: Any, **options: Any) -> Collected:
    return collector(judge, **options).collect(
        prompts(1, 2), sampling=SamplingParams(), num_samples=6, description="training samples"
    )


def score(found: Collected) -> Any:
    return score_groups(
        found.groups, lambda rewards: group_advantages(rewards, normalize=False), filter_zero_variance=True
    )


def test_answers_on_which_the_judge_failed_move_no_mean_and_are_not_trained_on() -> None:
    found = collect(fails_in_a_third)
    refuse_useless(1, found)
    # Of samples 0..5 the judge fails on 1 and 4; the others get 0, 0, 1, 1.
    assert [rollout.reward for rollout in found.groups[0].rollouts] == [0.0, None, 0.0, 1.0, None, 1.0]
    scored = score(found)
    assert scored.advantages == [[-0.5, None, -0.5, 0.5, None, 0.5]] * 2
    assert (scored.metrics["reward/mean"], scored.metrics["pass_fraction"]) == (0.5, 0.5)
    assert (scored.metrics["samples/judge_failed"], scored.metrics["samples/trained"]) == (4, 8)


def test_zero_for_a_failed_judge_is_trained_on() -> None:
    scored = score(collect(fails_in_a_third, failed_reward=0.0))
    assert scored.metrics["reward/mean"] == pytest.approx(1 / 3)
    assert (scored.metrics["samples/judge_failed"], scored.metrics["samples/trained"]) == (4, 12)


def test_run_ends_where_the_judge_fails_on_more_than_half_and_names_the_line() -> None:
    def fails_mostly(response: str, prompt: Prompt) -> float:
        return {"0": 1.0, "1": 0.0}[response.split()[-1]]

    line = fails_mostly.__code__.co_firstlineno + 1
    with pytest.raises(RunEnded) as caught:
        refuse_useless(3, collect(fails_mostly))
    sentence = caught.value.sentence
    assert sentence.startswith("rollout 3: the judge failed on 8 of 12 answers, first with KeyError: '2' (")
    assert sentence.endswith(f"test_collect.py, line {line}, in fails_mostly)")
    # Asked to take them for wrong answers, it goes on while any answer is judged.
    refuse_useless(3, collect(fails_mostly, failed_reward=0.0))


def test_run_ends_where_every_prompt_failed_and_says_why_the_first_did() -> None:
    found = collector(lambda *_: 1.0).collect(
        prompts(NO_ANSWER, NO_ANSWER), sampling=SamplingParams(), num_samples=2, description="training samples"
    )
    with pytest.raises(RunEnded) as caught:
        refuse_useless(3, found)
    assert caught.value.sentence == (
        "rollout 3: all of its prompts failed, the first with rollout worker 0 (10.0.0.2:80): out of memory"
    )


def test_evaluation_s_rates_are_of_what_was_answered_and_judged() -> None:
    def judge(response: str, prompt: Prompt) -> float | None:
        return None if prompt.id == 0 and response.endswith("1") else float(prompt.id > 0)

    config = EvaluationConfig(eval_samples_per_prompt=2)
    found = Evaluator(collector(judge), prompts(1, 2, NO_ANSWER), config, SamplingParams()).evaluate()
    assert found == {
        "eval/greedy": 0.5,  # of two: the third prompt was not answered
        "eval/pass@1": 0.5,
        "eval/pass@2": 1.0,  # of one: the first prompt has one judged answer
        "eval/prompts": 3.0,
        "eval/greedy/prompts": 2.0,
        "eval/pass@1/prompts": 2.0,
        "eval/pass@2/prompts": 1.0,
    }
