"""How a rollout is cut into updates."""

from __future__ import annotations

from xrl.actor.split import split_groups

GROUP_IDS = [4, 4, 9, 11, 11]


def test_groups_stay_whole_and_every_sample_is_in_one_update() -> None:
    assert split_groups(GROUP_IDS, 2) == [[0, 1, 3, 4], [2]]


def test_fewer_groups_than_updates_give_fewer_updates() -> None:
    assert split_groups(GROUP_IDS, 8) == [[0, 1], [2], [3, 4]]
    assert split_groups([], 3) == []
