"""The settings of a token's loss, which `token_terms` and the kernels that form its gradient read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from xrl.config import AlgorithmConfig

KLType = Literal["k1", "k2", "k3"]
ImportanceKind = Literal["off", "truncate", "mask"]


@dataclass(frozen=True, kw_only=True)
class TokenLossSettings:
    """Bounds and coefficients of the loss of one token.

    Raises:
        ValueError: a number out of range, or a kind that is unknown.
    """

    clip_low: float = 0.2  # ratios below 1 - clip_low are clipped
    clip_high: float = 0.2  # and those above 1 + clip_high
    dual_clip: float | None = None  # bound on the ratio where the advantage is negative, > 1; None: no bound
    kl_coef: float = 0.0  # of the KL to the reference; it is reported at 0 too
    kl_type: KLType = "k3"
    entropy_coef: float = 0.0  # of the entropy bonus
    importance_correction: ImportanceKind = "off"
    importance_bound: float = 2.0  # largest importance weight; mask drops those below its inverse too
    importance_from_current: bool = False  # whether the importance weight's numerator is the current log-prob, not old

    def __post_init__(self) -> None:
        if not 0 <= self.clip_low < 1 or not self.clip_high >= 0:
            raise ValueError(
                f"clip_low must be in [0, 1) and clip_high >= 0, got {self.clip_low:g} and {self.clip_high:g}"
            )
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip must be > 1, got {self.dual_clip:g}")
        if self.kl_type not in get_args(KLType):
            raise ValueError(f"kl_type must be one of {', '.join(get_args(KLType))}, got {self.kl_type}")
        if self.importance_correction not in get_args(ImportanceKind):
            raise ValueError(
                f"importance_correction must be one of {', '.join(get_args(ImportanceKind))}, "
                f"got {self.importance_correction}"
            )
        if not self.importance_bound > 1:
            raise ValueError(f"importance_bound must be > 1, got {self.importance_bound:g}")

    @classmethod
    def of(cls, config: AlgorithmConfig) -> TokenLossSettings:
        """The settings of a run's loss."""
        return cls(
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
            kl_coef=config.kl_coef,
            kl_type=config.kl_type,
            entropy_coef=config.entropy_coef,
            importance_correction=config.importance_correction,
            importance_bound=config.importance_bound,
            # With the engine's log-probs as denominator the actor's at sampling time are unknown; the current stand in.
            importance_from_current=config.old_logprobs == "rollout",
        )
