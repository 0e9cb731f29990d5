"""Judged groups -> samples with advantages: what cannot be learned from is left out, and counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from xrl.algorithms.advantages import has_zero_variance
from xrl.algorithms.sample import samples_of
from xrl.algorithms.scored import Scored
from xrl.metrics.pass_rate import passes
from xrl.types import Episode, Group, Sample


def score_groups(
    groups: Sequence[Group],
    advantages_of: Callable[[Sequence[float]], list[float]],
    *,
    filter_zero_variance: bool,
) -> Scored:
    """Give each answer its advantage within its group.

    Answers that failed (aborted, in error, empty, or with no finite reward as nobody could judge them) are left out
    first, for they say nothing about the policy; a group left with fewer than two answers is left out whole.

    Args:
        groups: judged answers; the index of a group becomes the `group_id` of its samples.
        advantages_of: [G] rewards -> [G] advantages, G >= 2.
        filter_zero_variance: leave out groups whose rewards are all equal.

    Returns:
        Samples in the order of the groups, and metrics over all answers that did not fail.
    """
    samples: list[Sample] = []
    advantages: list[list[float | None]] = []
    num_flat = num_filtered = num_too_small = 0
    for group_id, group in enumerate(groups):
        row: list[float | None] = [None] * len(group.episodes)
        advantages.append(row)
        usable = [index for index, episode in enumerate(group.episodes) if is_usable(episode)]
        rewards = [reward_of(group.episodes[index]) for index in usable]
        if len(rewards) < 2:
            num_too_small += 1
            continue
        if has_zero_variance(rewards):
            num_flat += 1
            if filter_zero_variance:
                num_filtered += 1
                continue
        for index, advantage in zip(usable, advantages_of(rewards), strict=True):
            row[index] = advantage
            samples += _samples(group.episodes[index], advantage, group_id)
    metrics = {
        **answer_metrics([episode for group in groups for episode in group.episodes]),
        "groups/total": float(len(groups)),
        "groups/flat": float(num_flat),
        "groups/zero_variance": float(num_filtered),
        "groups/too_small": float(num_too_small),
        "samples/trained": float(len(samples)),
    }
    return Scored(samples=samples, advantages=advantages, metrics=metrics)


def is_usable(episode: Episode) -> bool:
    """Whether there is an answer, finished or cut at the length limit, with a reward that is a number."""
    return episode.is_answered and math.isfinite(reward_of(episode))


def reward_of(episode: Episode) -> float:
    """The reward; NaN where nobody could say."""
    return math.nan if episode.verdict.reward is None else episode.verdict.reward


def answer_metrics(episodes: Sequence[Episode]) -> dict[str, float]:
    """Rewards and lengths of the answers that did not fail, and how many did; NaN means where none is left."""
    usable = [episode for episode in episodes if is_usable(episode)]
    rewards = [reward_of(episode) for episode in usable]
    lengths = [float(episode.num_tokens) for episode in usable]
    return {
        "reward/mean": _mean(rewards),
        "reward/std": _std(rewards),
        "pass_fraction": _mean([float(passes(reward)) for reward in rewards]),
        "response_length/mean": _mean(lengths),
        "response_length/max": max(lengths, default=math.nan),
        "response_length/min": min(lengths, default=math.nan),
        "truncated_fraction": _mean([float(episode.status == "length") for episode in usable]),
        "samples/failed": float(len(episodes) - len(usable)),
        "samples/unjudged": float(sum(episode.is_answered and not is_usable(episode) for episode in episodes)),
        "samples/judge_failed": float(sum(episode.verdict.failed for episode in episodes)),
    }


def _samples(episode: Episode, advantage: float, group_id: int) -> list[Sample]:
    try:
        return samples_of(episode, advantage=advantage, group_id=group_id)
    except ValueError as error:
        raise ValueError(f"prompt {episode.prompt.id}: {error}") from error


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _std(values: Sequence[float]) -> float:
    """Population standard deviation: of these answers, not an estimate for others."""
    if not values:
        return math.nan
    mean = _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
