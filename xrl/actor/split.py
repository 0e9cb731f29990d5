"""Deals a rollout's samples to its updates."""

from __future__ import annotations

from collections.abc import Sequence


def split_groups(group_ids: Sequence[int], num_updates: int) -> list[list[int]]:
    """Deal whole groups to the updates of a rollout, in turn; updates that would be empty are left out.

    Args:
        group_ids: of each sample.

    Returns:
        [update] -> indices of samples
    """
    update_of = {group_id: index % num_updates for index, group_id in enumerate(dict.fromkeys(group_ids))}
    updates: list[list[int]] = [[] for _ in range(num_updates)]
    for index, group_id in enumerate(group_ids):
        updates[update_of[group_id]].append(index)
    return [update for update in updates if update]
