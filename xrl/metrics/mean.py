"""A metric is a sum and a count: merged across micro-batches and ranks, divided once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Mean:
    """A weighted mean that has not been divided yet.

    `total` and `count` may be floats or 0-d tensors: tensors stay on their device until read, so
    that collecting a metric never waits for the GPU.
    """

    total: float | Tensor
    count: float | Tensor

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        """The mean; NaN where nothing was counted."""
        count = float(self.count)
        return float(self.total) / count if count else float("nan")


def merge(left: Mapping[str, Mean], right: Mapping[str, Mean]) -> dict[str, Mean]:
    """Add two sets of metrics name by name; a name missing on one side counts as nothing there."""
    merged = dict(left)
    for name, mean in right.items():
        merged[name] = merged[name] + mean if name in merged else mean
    return merged
