"""After every weight update each worker samples a few tokens from a fixed prompt, and the actor scores them.

Checksums prove that the bytes arrived; the canary, that they mean the same to both sides: a tensor under another's
name, or a layer that is computed otherwise, shows here. Engine and actor differ by rounding otherwise.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence

from xrl.algorithms.sample import sample_of
from xrl.config import RolloutConfig
from xrl.launch.exit import RunFailed
from xrl.rollout.fleet import Fleet
from xrl.types import GenerateRequest, Sample, SamplingParams

logger = logging.getLogger("xrl")

# Mean |rollout - actor log-prob|: (warn, stop), above what rounding makes of it and below what a wrong tensor does.
THRESHOLDS = {"float32": (1e-4, 1e-2), "bfloat16": (0.05, 0.5)}
# Odd numbers spread over any vocabulary; what they say does not matter.
PROMPT_TOKENS = 8
_SPREAD = 7919


class CanaryFailed(RunFailed):
    """Engine and actor do not compute the same."""


class Canary:
    """Asks the workers, and judges what the actor says to it. Rank 0 only."""

    def __init__(
        self,
        fleet: Fleet,
        config: RolloutConfig,
        *,
        dtype: str,
        vocab_size: int,
        max_model_len: int,
        sampling: SamplingParams,
    ) -> None:
        """
        Args:
            dtype: the coarser of the actor's and the engine's, "float32" or "bfloat16".
            max_model_len: longest prompt + response that the engines take.
            sampling: of training; the actor scores at its temperature.
        """
        warn, stop = THRESHOLDS[dtype]
        self.fleet = fleet
        self.timeout_s = config.rollout_timeout_s
        self.warn = warn if config.canary_warn is None else config.canary_warn
        self.stop = stop if config.canary_stop is None else config.canary_stop
        num_prompt = min(PROMPT_TOKENS, max_model_len - 1)
        self._prompt = [(index + 1) * _SPREAD % vocab_size for index in range(num_prompt)]
        # The whole distribution: the actor does not score a filtered one. No stop token: always as many tokens.
        self._sampling = dataclasses.replace(
            sampling,
            max_new_tokens=min(config.canary_tokens, max_model_len - num_prompt),
            top_k=0,
            top_p=1.0,
            stop_token_ids=(),
        )

    def sample(self) -> list[Sample]:
        """Sample the prompt once on every ready worker, in the order of the workers; empty if none is left.

        Raises:
            WorkerRefused: a worker cannot answer.
            WorkerGone: one is lost, and `on_lost_worker` is "stop".
        """
        answers = self.fleet.ask_all(self._request(), timeout_s=self.timeout_s)
        return [
            sample_of(
                self._prompt,
                completion,
                advantage=0.0,
                group_id=worker.number,
                episode_id=index,
                temperature=self._sampling.temperature,
            )
            for index, (worker, (completion,)) in enumerate(answers)
        ]

    def judge(self, differences: Sequence[float]) -> float:
        """The largest of the workers' mean |rollout - actor log-prob|.

        Raises:
            CanaryFailed: it is over the threshold for stopping, or not a number.
        """
        worst = max(differences, key=lambda value: math.inf if math.isnan(value) else value, default=0.0)
        if not math.isfinite(worst):
            raise CanaryFailed(
                f"canary: after the update to weights version {self.fleet.version} log-probs of an engine or the actor "
                f"are not finite: the weights hold NaN or infinity, or one of the two computes it"
            )
        if worst > self.stop:
            raise CanaryFailed(
                f"canary: after the update to weights version {self.fleet.version} an engine's log-probs differ from "
                f"the actor's by {worst:.3g} on average, more than --canary-stop {self.stop:g}: the engine computes "
                f"another model than the actor"
            )
        if worst > self.warn:
            logger.warning(
                "canary: after the update to weights version %s an engine's log-probs differ from the actor's by %.3g "
                "on average, more than --canary-warn %g",
                self.fleet.version,
                worst,
                self.warn,
            )
        return worst

    def _request(self) -> GenerateRequest:
        return GenerateRequest(
            id=f"canary-{self.fleet.version}", token_ids=self._prompt, num_samples=1, sampling=self._sampling
        )
