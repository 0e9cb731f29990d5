"""What holds for every test."""

from __future__ import annotations

import gc

import pytest

# Libraries and tests are a million objects that stay: the garbage collector need not go through them again and again,
# neither while they are imported nor in any test.
gc.disable()


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_sessionfinish(session: pytest.Session) -> None:
    gc.unfreeze()  # libraries that count their objects at the end of the process would miss these
