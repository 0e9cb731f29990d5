"""Judged groups become samples."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.samples import contents
from xrl.algorithms.advantages import group_advantages
from xrl.algorithms.scoring import is_comparable, score_groups
from xrl.types import Completion, Episode, Group, Prompt, Verdict


def rollout(reward, *, length=3, finish_reason="stop", prompt_id=0, judge_error="", num_logprobs=None, temperature=0.7):
    prompt = Prompt(id=prompt_id, token_ids=[1, 2], text="1+1?", ground_truth="2")
    logprobs = np.full(length if num_logprobs is None else num_logprobs, -0.5, np.float32)
    completion = Completion(
        token_ids=np.arange(length, dtype=np.int32), logprobs=logprobs, finish_reason=finish_reason, weights_version=0
    )
    failure, _, detail = judge_error.partition(": ")
    verdict = Verdict(reward=reward, failure=failure, detail=detail)
    return Episode.of_answer(prompt, completion, "2", verdict, temperature=temperature)


def group(*rewards, **kwargs):
    return Group(episodes=tuple(rollout(reward, **kwargs) for reward in rewards))


def advantage_of(sample):
    (value,) = set(sample.advantages[sample.trained].tolist())
    return value


def of_no_episode(sample):
    return {**contents(sample), "episode_id": None}


def score(groups, *, filter_zero_variance=True, keep=None):
    return score_groups(
        groups,
        lambda rewards: group_advantages(rewards, normalize=False),
        keep=keep or (lambda group: is_comparable(group, filter_zero_variance=filter_zero_variance)),
    )


def test_samples_carry_tokens_log_probs_advantage_and_the_index_of_their_group():
    scored = score([group(1.0, 0.0), group(0.0, 0.0, 1.0, 0.0, prompt_id=7)])
    assert [sample.group_id for sample in scored.samples] == [0, 0, 1, 1, 1, 1]
    assert [advantage_of(sample) for sample in scored.samples] == [0.5, -0.5, -0.25, -0.25, 0.75, -0.25]
    first = scored.samples[0]
    assert (first.token_ids.tolist(), first.prompt_length) == ([1, 2, 0, 1, 2], 2)
    assert first.trained.tolist() == [False] * 2 + [True] * 3
    assert first.rollout_logprobs.tolist() == [0.0] * 2 + [-0.5] * 3
    assert scored.advantages == [[0.5, -0.5], [-0.25, -0.25, 0.75, -0.25]]
    assert [sample.episode_id for sample in scored.samples] == list(range(6))
    assert {sample.temperature for sample in scored.samples} == {0.7}


def test_groups_of_equal_rewards_are_left_out_and_counted():
    scored = score([group(1.0, 1.0), group(1.0, 0.0), group(0.0, 0.0)])
    assert {sample.group_id for sample in scored.samples} == {1}
    assert scored.metrics["groups/zero_variance"] == scored.metrics["groups/flat"] == 2
    assert scored.metrics["groups/total"] == 3
    assert scored.metrics["samples/trained"] == 2
    assert scored.advantages == [[None, None], [0.5, -0.5], [None, None]]


def test_groups_of_equal_rewards_are_kept_without_the_filter_but_counted():
    scored = score([group(1.0, 1.0)], filter_zero_variance=False)
    assert [advantage_of(sample) for sample in scored.samples] == [0.0, 0.0]
    assert scored.metrics["groups/zero_variance"] == 0
    assert scored.metrics["groups/flat"] == 1


@pytest.mark.parametrize(
    "failed",
    [
        rollout(0.0, finish_reason="abort"),
        rollout(0.0, finish_reason="error"),
        rollout(0.0, length=0),
        rollout(None, judge_error="ValueError: no"),
        rollout(math.nan),
    ],
)
def test_a_failed_answer_is_left_out_and_does_not_move_its_siblings(failed):
    mixed = Group(episodes=(rollout(1.0), failed, rollout(0.0)))
    scored = score([mixed])
    assert scored.advantages == [[0.5, None, -0.5]]
    assert len(scored.samples) == 2
    assert scored.metrics["samples/failed"] == 1
    assert scored.metrics["reward/mean"] == 0.5


def test_a_group_left_with_one_answer_is_left_out_whole():
    scored = score([Group(episodes=(rollout(1.0), rollout(0.0, finish_reason="error")))])
    assert scored.samples == []
    assert scored.metrics["groups/too_small"] == 1


def test_metrics_describe_all_answers_also_of_groups_left_out():
    long = rollout(0.0, length=9, finish_reason="length", judge_error="time-out: no reward within 10 s")
    scored = score([group(1.0, 1.0), Group(episodes=(rollout(1.0, length=1), long))])
    metrics = scored.metrics
    assert metrics["reward/mean"] == 0.75
    assert metrics["reward/std"] == pytest.approx(math.sqrt(3) / 4)
    assert metrics["pass_fraction"] == 0.75
    assert metrics["response_length/mean"] == 4.0
    assert (metrics["response_length/min"], metrics["response_length/max"]) == (1.0, 9.0)
    assert metrics["truncated_fraction"] == 0.25
    assert metrics["samples/judge_failed"] == 1


def test_answers_that_nobody_could_judge_are_in_no_mean():
    failed = [rollout(None, length=50, judge_error="KeyError: 'x'") for _ in range(4)]
    judged = [rollout(reward) for reward in (1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0)]
    groups = [Group(episodes=(*judged[:4], *failed[:2])), Group(episodes=(*failed[2:], *judged[4:]))]
    scored, without = score(groups), score([Group(episodes=tuple(judged[:4])), Group(episodes=tuple(judged[4:]))])
    assert list(map(of_no_episode, scored.samples)) == list(map(of_no_episode, without.samples))
    assert [sample.episode_id for sample in scored.samples] == [0, 1, 2, 3, 8, 9, 10, 11]
    counts = {"samples/failed": 4.0, "samples/unjudged": 4.0, "samples/judge_failed": 4.0}
    assert scored.metrics == {**without.metrics, **counts}
    assert [row.count(None) for row in scored.advantages] == [2, 2]


def test_a_failed_judge_s_zero_is_trained_on_where_it_is_asked_for():
    scored = score([Group(episodes=(rollout(1.0), rollout(0.0, judge_error="ValueError: no")))])
    assert scored.advantages == [[0.5, -0.5]]
    assert (scored.metrics["samples/judge_failed"], scored.metrics["samples/unjudged"]) == (1, 0)


def test_no_groups_give_no_samples_and_no_numbers():
    scored = score([])
    assert scored.samples == []
    assert math.isnan(scored.metrics["reward/mean"])
    assert scored.metrics["groups/total"] == 0


def test_an_engine_that_returns_too_few_log_probs_is_named():
    with pytest.raises(ValueError, match="prompt 5: an answer has 3 tokens and 2 log-probs"):
        score([group(1.0, 0.0, prompt_id=5, num_logprobs=2)])


def test_a_greedy_answer_is_refused():
    with pytest.raises(ValueError, match="prompt 5: an answer was drawn at temperature 0, .* needs a temperature > 0"):
        score([group(1.0, 0.0, prompt_id=5, temperature=0.0)])


def test_groups_that_an_own_rule_leaves_out_are_counted_by_themselves():
    scored = score([group(1.0, 0.0), group(1.0, 0.0, 0.0), group(1.0, 1.0)], keep=lambda one: len(one.episodes) == 3)
    assert {sample.group_id for sample in scored.samples} == {1}
    assert [sample.episode_id for sample in scored.samples] == [2, 3, 4]
    assert (scored.metrics["groups/left_out"], scored.metrics["groups/zero_variance"]) == (1, 1)
    assert "groups/left_out" not in score([group(1.0, 0.0)]).metrics
