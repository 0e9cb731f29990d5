"""A rollout's samples into its updates."""

from __future__ import annotations

from collections.abc import Sequence

from xrl.types import Sample


def split_groups(samples: Sequence[Sample], num_parts: int) -> list[list[Sample]]:
    """Deal whole groups to the updates of a rollout, in turn; parts that would be empty are left out."""
    group_ids = list(dict.fromkeys(sample.group_id for sample in samples))
    part_of = {group_id: place % num_parts for place, group_id in enumerate(group_ids)}
    parts: list[list[Sample]] = [[] for _ in range(num_parts)]
    for sample in samples:
        parts[part_of[sample.group_id]].append(sample)
    return [part for part in parts if part]
