"""An algorithm of the user's own, by reference: built, and refused where it lacks what a run needs of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from xrl.config import AlgorithmConfig, SettingsError
from xrl.files.blame import location_raised, words_of
from xrl.files.references import ReferenceKind

if TYPE_CHECKING:
    from xrl.algorithms import Algorithm

OWN_ALGORITHM = ReferenceKind(flag="--algorithm", noun="Class")
_METHODS = ("score", "keep", "token_shares", "loss")
_SETTINGS = ("updates_per_rollout", "old_logprobs", "kl_coef", "entropy_coef")


def is_own(config: AlgorithmConfig) -> bool:
    """Whether `--algorithm` refers to a class of the user's own."""
    return ":" in config.algorithm


def create_own(config: AlgorithmConfig) -> Algorithm:
    """Import the class that `--algorithm` refers to and build it as Class(config), which runs the user's code.

    Raises:
        SettingsError: it cannot be imported or built, or has not all that `Algorithm` asks for.
    """
    source, name = OWN_ALGORITHM.parts(config.algorithm)
    _, found = OWN_ALGORITHM.load(config.algorithm)
    start = f"--algorithm {config.algorithm}: {name}"
    if not isinstance(found, type):
        raise SettingsError(f"{start} in {source} is a {type(found).__name__}, not a class")
    try:
        algorithm = found(config)
    except SettingsError:
        raise
    except (Exception, SystemExit) as error:
        location = location_raised(error)
        raise SettingsError(
            f"{start} cannot be built from the settings: {type(error).__name__}: {words_of(error)}"
            f"{f' ({location})' if location else ''}"
        ) from error
    lacking = _lacking(algorithm)
    if lacking:
        raise SettingsError(f"{start} lacks {', '.join(lacking)}: derive it from xrl.algorithms.grpo.GRPO, or add that")
    return cast("Algorithm", algorithm)


def _lacking(algorithm: object) -> list[str]:
    settings = getattr(algorithm, "settings", None)
    return [
        *(f"{name}()" for name in _METHODS if not callable(getattr(algorithm, name, None))),
        *(["fused_loss"] if not hasattr(algorithm, "fused_loss") else []),
        *(f"settings.{name}" for name in _SETTINGS if not hasattr(settings, name)),
    ]
