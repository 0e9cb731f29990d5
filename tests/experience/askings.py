"""What is asked of engines that are always ready."""

from __future__ import annotations

from typing import TypeVar

from xrl.experience.asking import Asking

T = TypeVar("T")


def finished(asking: Asking[T]) -> T:
    """What it comes to, without anything that it needs."""
    try:
        need = next(asking)
    except StopIteration as end:
        found: T = end.value
        return found
    raise AssertionError(f"it needs {need}")
