"""Judged groups -> samples with advantages: what cannot be learned from is left out, and counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from xrl.algorithms.advantages import has_zero_variance
from xrl.algorithms.sample import sample_of
from xrl.algorithms.scored import Scored
from xrl.metrics.pass_rate import passes
from xrl.types import Group, Rollout, Sample


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
        row: list[float | None] = [None] * len(group.rollouts)
        advantages.append(row)
        first, first_of_group = first_of_group, first_of_group + len(group.rollouts)
        usable = [index for index, rollout in enumerate(group.rollouts) if is_usable(rollout)]
        rewards = [reward_of(group.rollouts[index]) for index in usable]
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
            samples.append(_sample(group.rollouts[index], advantage, group_id, first + index))
    metrics = {
        **answer_metrics([rollout for group in groups for rollout in group.rollouts]),
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
    rewards = [reward_of(rollout) for rollout in group.rollouts if is_usable(rollout)]
    return len(rewards) >= 2 and not (filter_zero_variance and has_zero_variance(rewards))


def is_usable(rollout: Rollout) -> bool:
    """Whether there is an answer, finished or cut at the length limit, with a reward that is a number."""
    return is_answered(rollout) and math.isfinite(reward_of(rollout))


def is_answered(rollout: Rollout) -> bool:
    """Whether there is an answer, finished or cut at the length limit."""
    return rollout.completion.finish_reason in ("stop", "length") and bool(rollout.completion.token_ids)


def reward_of(rollout: Rollout) -> float:
    """The reward; NaN where nobody could say."""
    return math.nan if rollout.reward is None else rollout.reward


def answer_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Rewards and lengths of the answers that did not fail, and how many did; NaN means where none is left."""
    usable = [rollout for rollout in rollouts if is_usable(rollout)]
    rewards = [reward_of(rollout) for rollout in usable]
    lengths = [float(len(rollout.completion.token_ids)) for rollout in usable]
    return {
        "reward/mean": _mean(rewards),
        "reward/std": _std(rewards),
        "pass_fraction": _mean([float(passes(reward)) for reward in rewards]),
        "response_length/mean": _mean(lengths),
        "response_length/max": max(lengths, default=math.nan),
        "response_length/min": min(lengths, default=math.nan),
        "truncated_fraction": _mean([float(rollout.completion.finish_reason == "length") for rollout in usable]),
        "samples/failed": float(len(rollouts) - len(usable)),
        "samples/unjudged": float(sum(is_answered(rollout) and not is_usable(rollout) for rollout in rollouts)),
        "samples/judge_failed": float(sum(bool(rollout.judge_error) for rollout in rollouts)),
    }


def _sample(rollout: Rollout, advantage: float, group_id: int, episode_id: int) -> Sample:
    try:
        return sample_of(
            rollout.prompt.token_ids,
            rollout.completion,
            advantage=advantage,
            group_id=group_id,
            episode_id=episode_id,
            temperature=rollout.temperature,
        )
    except ValueError as error:
        raise ValueError(f"prompt {rollout.prompt.id}: {error}") from error


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _std(values: Sequence[float]) -> float:
    """Population standard deviation: of these answers, not an estimate for others."""
    if not values:
        return math.nan
    mean = _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
