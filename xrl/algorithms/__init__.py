"""From judged answers to a loss: advantages, clipping, KL, importance weights. The table of algorithms is below.

Importing this room costs no torch, so settings can be checked against the table at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from xrl.config import AlgorithmConfig, SettingsError
from xrl.config.names import hint
from xrl.types import Group, LossInputs, LossOutput

if TYPE_CHECKING:
    from xrl.algorithms.scored import Scored

# --algorithm -> module:class. A new algorithm is a file, a line here and a test.
ALGORITHMS: Mapping[str, str] = MappingProxyType(
    {
        "grpo": "xrl.algorithms.grpo:GRPO",
    }
)


class Algorithm(Protocol):
    """What the trainer asks of an algorithm."""

    fused_loss: AlgorithmConfig | None
    """Settings of `token_terms` where `loss` is their weighted sum, so that a fused kernel may stand in; else None."""

    def score(self, groups: Sequence[Group]) -> Scored:
        """Judged groups in, samples with advantages out."""
        ...

    def loss(self, inputs: LossInputs) -> LossOutput:
        """The share of one micro-batch in the loss of the update."""
        ...


def check_algorithm(name: str) -> None:
    """Refuse a name that is not in the table, without importing torch.

    Raises:
        SettingsError: naming the known algorithms.
    """
    if name not in ALGORITHMS:
        raise SettingsError(
            f"--algorithm {name!r} is unknown{hint('algorithm', name)}, the known ones are: "
            f"{', '.join(sorted(ALGORITHMS))}"
        )


def create_algorithm(config: AlgorithmConfig) -> Algorithm:
    """Build the algorithm that `--algorithm` names.

    Raises:
        SettingsError: the name is not in the table.
    """
    check_algorithm(config.algorithm)
    module, name = ALGORITHMS[config.algorithm].split(":")
    algorithm: Algorithm = getattr(import_module(module), name)(config)
    return algorithm
