"""How long ranks may be silent, or get nothing done, before that is a hang."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from xrl.config import Settings
from xrl.launch.progress import PhaseKind

# A process computes in C for seconds without letting another thread run, on a busy machine for tens of seconds.
SILENCE_S = 120.0
# Three beats, whatever the scale.
LEAST_SILENCE_S = 15.0
# Beyond the longest wait of rank 0 that its settings bound: what it does itself meanwhile.
GRACE_S = 600.0

# Longest time in which no rank gets anything done, by phase: Settings.longest_wait_s and GRACE_S, and on top of that
MORE_S: Mapping[PhaseKind, float] = {
    "start": 1800.0,  # hundreds of gigabytes of weights are read, by engines that start, too
    "rollout": 0.0,  # every answer and every verdict is a piece
    "update": 0.0,  # every micro-batch is a piece; a collective that waits has its own limit, which is shorter
    "publish": 0.0,  # every part of the weights is a piece
    "save": 1800.0,  # every part is a piece, but a slow file system may take its time to flush them all at the end
    "evaluation": 0.0,  # as a rollout
}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one run, in seconds."""

    silence_s: float  # without a beat of a rank
    phases: Mapping[PhaseKind, float]  # without anything done by any rank

    @classmethod
    def of(cls, settings: Settings) -> Limits:
        """Those of a run with these settings."""
        scale, longest = settings.run.hang_limit_scale, settings.longest_wait_s + GRACE_S
        return cls(
            silence_s=max(LEAST_SILENCE_S, scale * SILENCE_S),
            phases={kind: scale * (longest + more) for kind, more in MORE_S.items()},
        )
