"""Rank arithmetic."""

from __future__ import annotations

import pytest

from xrl.parallel.layout import Layout


def test_every_place_of_the_grid_has_its_own_rank() -> None:
    layout = Layout.of_world(24, tensor_size=2, pipeline_size=3)
    assert layout.data_size == 4
    ranks = [
        layout.rank(tensor=tensor, pipeline=pipeline, data=data)
        for pipeline in range(3)
        for data in range(4)
        for tensor in range(2)
    ]
    assert ranks == list(range(24))
    assert str(layout) == "TP2 x PP3 x DP4"


def test_stages_hold_consecutive_layers() -> None:
    layout = Layout.of_world(4, tensor_size=1, pipeline_size=4)
    assert [list(layout.layers(stage, 8)) for stage in range(4)] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_layers_that_do_not_spread_evenly_are_refused() -> None:
    with pytest.raises(ValueError, match="7 layers do not spread evenly over 2"):
        Layout.of_world(2, tensor_size=1, pipeline_size=2).layers(0, 7)


def test_world_that_the_layout_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="world size 6 is not divisible by 2 x 2 = 4"):
        Layout.of_world(6, tensor_size=2, pipeline_size=2)
