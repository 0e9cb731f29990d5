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
    keep: Callable[[Group], bool],
) -> Scored:
    """Give each answer its advantage within its group.

    Answers that failed (aborted, in error, empty, or with no finite reward as nobody could judge them) are left out
    first, for they say nothing about the policy.

    Args:
        groups: judged answers; the index of a group becomes the `group_id` of its samples.
        advantages_of: [G] rewards -> [G] advantages, G >= 2.
        keep: whether a group is learned from.

    The ordinal of an answer among all of the rollout, failed ones too, becomes the `episode_id` of its sample.

    Returns:
        Samples in the order of the groups, and metrics over all answers that did not fail.
    """
    samples: list[Sample] = []
    advantages: list[list[float | None]] = []
    num_flat = num_filtered = num_too_small = num_left_out = 0
    first_of_group = 0  # ordinal of its first answer in the rollout
    for group_id, group in enumerate(groups):
        row: list[float | None] = [None] * len(group.episodes)
        advantages.append(row)
        first, first_of_group = first_of_group, first_of_group + len(group.episodes)
        usable = [index for index, episode in enumerate(group.episodes) if is_usable(episode)]
        rewards = [reward_of(group.episodes[index]) for index in usable]
        is_kept = keep(group)
        is_small = len(rewards) < 2
        is_flat = not is_small and has_zero_variance(rewards)
        num_too_small += is_small
        num_flat += is_flat
        num_filtered += is_flat and not is_kept
        num_left_out += not (is_kept or is_small or is_flat)
        if not is_kept:
            continue
        for index, advantage in zip(usable, advantages_of(rewards), strict=True):
            row[index] = advantage
            samples += _samples(group.episodes[index], advantage, group_id, first + index)
    metrics = {
        **answer_metrics([episode for group in groups for episode in group.episodes]),
        "groups/total": float(len(groups)),
        "groups/flat": float(num_flat),
        "groups/zero_variance": float(num_filtered),
        "groups/too_small": float(num_too_small),
        "samples/trained": float(len(samples)),
    }
    if num_left_out:  # by a rule of the user's own
        metrics["groups/left_out"] = float(num_left_out)
    return Scored(samples=samples, advantages=advantages, metrics=metrics)


def is_comparable(group: Group, *, filter_zero_variance: bool) -> bool:
    """Whether a group has two answers that did not fail and, where flat groups are filtered, different rewards."""
    rewards = [reward_of(episode) for episode in group.episodes if is_usable(episode)]
    return len(rewards) >= 2 and not (filter_zero_variance and has_zero_variance(rewards))


def is_usable(episode: Episode) -> bool:
    """Whether there is an answer, finished or cut at the length limit, with a reward that is a number."""
    return episode.is_answered and math.isfinite(reward_of(episode))


def reward_of(episode: Episode) -> float:
    """The reward; NaN if the judge gave none."""
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


def _samples(episode: Episode, advantage: float, group_id: int, episode_id: int) -> list[Sample]:
    try:
        return samples_of(episode, advantage=advantage, group_id=group_id, episode_id=episode_id)
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
