"""Lengths of time as people write them: 55m, 1h30m, 3300s."""

from __future__ import annotations

import re

_PARTS = re.compile(r"(?:([0-9]{1,9})d)?(?:([0-9]{1,9})h)?(?:([0-9]{1,9})m)?(?:([0-9]{1,9})s)?")
_SECONDS = (86_400, 3_600, 60, 1)


def duration_s(text: str) -> int | None:
    """The seconds that `text` says: days, hours, minutes and seconds, the larger first; None: it says none."""
    found = _PARTS.fullmatch(text)
    if found is None or not any(found.groups()):
        return None
    return sum(int(part or 0) * seconds for part, seconds in zip(found.groups(), _SECONDS, strict=True))
