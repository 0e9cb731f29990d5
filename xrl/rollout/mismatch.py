"""The bounds of `mismatch`: how far the log-probs of a rollout's answers may be from the actor's own.

The canary asks each worker for a few tokens after an update; the mismatch is of every token that is trained on. What
the canary cannot see shows here: an engine that computes long contexts otherwise, or answers that are not what the
engine sampled.
"""

from __future__ import annotations

import logging
import math

from xrl.config import RolloutConfig
from xrl.launch.exit import RunFailed
from xrl.rollout.canary import THRESHOLDS

logger = logging.getLogger("xrl")


class MismatchFailed(RunFailed):
    """The answers were not sampled from what the actor computes."""


class MismatchBounds:
    """Warns of a rollout's mean |rollout - actor log-prob|, or refuses it."""

    def __init__(self, config: RolloutConfig, *, dtype: str) -> None:
        """
        Args:
            dtype: the coarser of the actor's and the engine's, "float32" or "bfloat16".
        """
        warn, stop = THRESHOLDS[dtype]
        # Here answers differ from the actor by what the user has asked for: older weights sampled their first tokens,
        # or another distribution all of them.
        if config.partial_rollout or config.top_k > 0 or config.top_p < 1:
            warn = stop = math.inf
        self.warn = warn if config.mismatch_warn is None else config.mismatch_warn
        self.stop = stop if config.mismatch_stop is None else config.mismatch_stop

    def judge(self, mismatch: float, *, rollout: int) -> None:
        """Judge the first update after a rollout: later ones no longer see the weights that sampled.

        Raises:
            MismatchFailed: it is over the bound for stopping, or not a number.
        """
        words = f"rollout {rollout}: log-probs of the answers differ from the actor's by {mismatch:.3g} on average"
        if not mismatch <= self.stop:
            raise MismatchFailed(
                f"{words}, more than --mismatch-stop {self.stop:g}: what the actor computes has not sampled them; "
                f"the update that they went into is not saved"
            )
        if mismatch > self.warn:
            logger.warning("%s, more than --mismatch-warn %g", words, self.warn)
