"""A rollout's samples into its updates."""

from __future__ import annotations

from collections.abc import Sequence


def split_groups(group_ids: Sequence[int], num_parts: int) -> list[list[int]]:
    """Deal whole groups to the updates of a rollout, in turn; parts that would be empty are left out.

    Args:
        group_ids: of each sample.

    Returns:
        [update] -> indices of samples
    """
    part_of = {group_id: index % num_parts for index, group_id in enumerate(dict.fromkeys(group_ids))}
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    for index, group_id in enumerate(group_ids):
        parts[part_of[group_id]].append(index)
    return [part for part in parts if part]
