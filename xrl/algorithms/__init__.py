"""From judged answers to a loss: advantages, clipping, KL, importance weights. The table of algorithms is below.

Importing this room costs no torch, so settings can be checked against the table at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, Protocol

from xrl.algorithms.own import OWN_ALGORITHM, create_own, is_own
from xrl.config import AlgorithmConfig, SettingsError
from xrl.config.names import hint
from xrl.types import Group, LossInputs, LossOutput, SampleSize

if TYPE_CHECKING:
    from xrl.algorithms.scored import Scored

# --algorithm -> module:class. A new algorithm is a file, a line here and a test.
ALGORITHMS: Mapping[str, str] = MappingProxyType(
    {
        "grpo": "xrl.algorithms.grpo:GRPO",
    }
)


class LearnerSettings(Protocol):
    """The settings of an algorithm that the actor reads. An algorithm may have more."""

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer updates made from one rollout, each on its own share of the groups."""
        ...

    @property
    def old_logprobs(self) -> Literal["actor", "rollout"]:
        """Whose log-probs are `LossInputs.old_logprobs`."""
        ...

    @property
    def kl_coef(self) -> float:
        """If it is not 0, the loss gets the log-probs of the model that the run started from."""
        ...

    @property
    def entropy_coef(self) -> float:
        """If it is not 0, the entropy that the loss gets carries a gradient."""
        ...


class Algorithm(Protocol):
    """What the trainer and the actor ask of an algorithm, which owns its settings."""

    @property
    def settings(self) -> LearnerSettings:
        """The algorithm's settings, of which the actor reads these."""
        ...

    fused_loss: AlgorithmConfig | None
    """Settings of `token_terms` where `loss` is their weighted sum, so that a fused kernel may stand in; else None."""

    def score(self, groups: Sequence[Group]) -> Scored:
        """Turn judged groups into samples with advantages."""
        ...

    def keep(self, group: Group) -> bool:
        """Whether a group is learned from."""
        ...

    def token_shares(self, sizes: Sequence[SampleSize]) -> Sequence[float]:
        """What a trained token counts for in the loss, for each sample of an update; over all tokens they sum to 1."""
        ...

    def loss(self, inputs: LossInputs) -> LossOutput:
        """The share of one micro-batch in the loss of the update."""
        ...


def check_algorithm(config: AlgorithmConfig) -> None:
    """Find the algorithm before anything slow starts. A user's own is not run yet: `trial.AlgorithmTrial` does that.

    Raises:
        SettingsError: no such algorithm or file.
    """
    if is_own(config):
        OWN_ALGORITHM.check(config.algorithm)
    elif config.algorithm not in ALGORITHMS:
        raise SettingsError(
            f"--algorithm {config.algorithm!r} is unknown{hint('algorithm', config.algorithm)}, the known ones are: "
            f"{', '.join(sorted(ALGORITHMS))}; or a class of your own as package.module:Class or path/file.py:Class"
        )


def create_algorithm(config: AlgorithmConfig) -> Algorithm:
    """Build the algorithm that `--algorithm` names.

    Raises:
        SettingsError: the name is not in the table, or a class of the user's own cannot be had or lacks something.
    """
    if is_own(config):
        return create_own(config)
    check_algorithm(config)
    module, name = ALGORITHMS[config.algorithm].split(":")
    algorithm: Algorithm = getattr(import_module(module), name)(config)
    return algorithm
