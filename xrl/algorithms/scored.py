"""Judged groups, scored by an algorithm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from xrl.types import Sample


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Samples to train on, and metrics of the groups that they come from."""

    samples: list[Sample]  # in the order of the groups; answers and groups that were left out are missing
    advantages: list[list[float | None]]  # [groups][answers] as handed in; None: left out of training
    metrics: Mapping[str, float]  # of the whole rollout, ready to report
