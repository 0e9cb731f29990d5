"""The embedded engine at a pace that leaves others time to cut it off: `--engine tests.rollout.paced_engine:make`."""

from __future__ import annotations

import time
from typing import Any

from xrl.rollout.embedded.engine import EmbeddedEngine

STEP_S = 0.01


def make(**settings: Any) -> EmbeddedEngine:
    """An engine whose decode steps take STEP_S longer."""
    engine = EmbeddedEngine(**settings)
    decoder = engine._decoder
    decode = decoder.decode

    def decode_slowly(*step: Any, **options: Any) -> Any:
        time.sleep(STEP_S)
        return decode(*step, **options)

    decoder.decode = decode_slowly  # type: ignore[method-assign]
    return engine
