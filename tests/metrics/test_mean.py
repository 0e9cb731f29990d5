"""Metrics that merge."""

from __future__ import annotations

import math

import torch

from xrl.metrics.mean import merge
from xrl.types import Mean


def test_a_mean_is_divided_once_after_merging():
    assert (Mean(1.0, 1) + Mean(5.0, 3)).value == 1.5


def test_nothing_counted_is_not_a_number():
    assert math.isnan(Mean(0.0, 0).value)
    assert math.isnan(Mean(torch.tensor(0.0), torch.tensor(0.0)).value)


def test_tensors_stay_tensors_until_read():
    total = Mean(torch.tensor(1.0), torch.tensor(2.0)) + Mean(torch.tensor(2.0), torch.tensor(1.0))
    assert isinstance(total.total, torch.Tensor)
    assert total.value == 1.0


def test_merge_keeps_names_that_only_one_side_has():
    merged = merge({"a": Mean(1.0, 1), "b": Mean(2.0, 1)}, {"b": Mean(4.0, 1), "c": Mean(3.0, 1)})
    assert {name: mean.value for name, mean in merged.items()} == {"a": 1.0, "b": 3.0, "c": 3.0}
