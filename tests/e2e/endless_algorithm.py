"""GRPO, whose loss never ends on rank 1."""

from __future__ import annotations

import os

from xrl.algorithms.grpo import GRPO
from xrl.types import LossInputs, LossOutput


class Endless(GRPO):
    def loss(self, inputs: LossInputs) -> LossOutput:
        while os.environ.get("RANK") == "1":
            pass
        return super().loss(inputs)
