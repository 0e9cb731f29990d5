"""Lengths of time as people write them."""

from __future__ import annotations

import pytest

from xrl.config import SettingsError
from xrl.config.durations import duration_s
from xrl.config.run import RunConfig


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("55m", 3300), ("1h30m", 5400), ("3300s", 3300), ("1d2h3m4s", 93784), ("0s", 0), ("2h5s", 7205)],
)
def test_parts_are_added_up(text: str, seconds: int) -> None:
    assert duration_s(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "55", "m", "30m1h", "1.5h", "-5m", " 5m", "5m ", "1h 30m", "5M", "٣m", "1" * 99 + "s"]
)
def test_other_spellings_are_no_durations(text: str) -> None:
    assert duration_s(text) is None


@pytest.mark.parametrize("text", ["3300", "0s", "soon", "999d"])
def test_a_time_that_is_none_is_refused_with_what_is_needed(text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        RunConfig(exit_before=text)
    assert str(caught.value) == (
        f"--exit-before needs a time such as 55m, 1h30m or 3300s, at most 10,000,000 s, found '{text}'"
    )


def test_without_a_limit_there_is_always_time() -> None:
    assert RunConfig().exit_before_s == float("inf")
    assert RunConfig(exit_before="1h30m").exit_before_s == 5400
