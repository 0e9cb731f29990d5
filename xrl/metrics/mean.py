"""Metrics as sums and counts, put together by name."""

from __future__ import annotations

from collections.abc import Mapping

from xrl.types import Mean


def merge(left: Mapping[str, Mean], right: Mapping[str, Mean]) -> dict[str, Mean]:
    """Add two sets of metrics name by name; a name missing on one side counts as nothing there."""
    merged = dict(left)
    for name, mean in right.items():
        merged[name] = merged[name] + mean if name in merged else mean
    return merged
