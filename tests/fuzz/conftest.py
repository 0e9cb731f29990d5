"""Random and hostile inputs. `make test` tries a few of each kind, `make fuzz` many, of other seeds.

XRL_FUZZ_TIMES multiplies the cases of each test, XRL_FUZZ_SEED changes them.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass

import pytest


@dataclass(frozen=True, kw_only=True)
class Fuzz:
    """How many cases, and which."""

    times: int
    seed: int

    def num_cases(self, ordinary: int) -> int:
        """Cases of a test that has `ordinary` of them in `make test`."""
        return ordinary * self.times

    def random(self) -> random.Random:
        """The source of a test's cases: the same ones for the same seed."""
        return random.Random(self.seed)


@pytest.fixture
def fuzz() -> Fuzz:
    return Fuzz(times=int(os.environ.get("XRL_FUZZ_TIMES", "1")), seed=int(os.environ.get("XRL_FUZZ_SEED", "0")))
