"""GRPO and its switches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from xrl.config.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """What is learned from judged groups."""

    algorithm: str = "grpo"
    """What turns judged groups into advantages and a loss; a class of your own is built from these settings."""

    normalize_advantages: bool = True
    """Divide group-centred rewards by the group's standard deviation (off: Dr. GRPO's advantages)."""

    filter_zero_variance: bool = True
    """Leave out groups whose rewards are all equal: they carry no gradient."""

    clip_low: float = 0.2
    """Ratios below 1 - clip-low are clipped."""

    clip_high: float = 0.2
    """Ratios above 1 + clip-high are clipped."""

    dual_clip: float | None = None
    """Bound on the ratio where the advantage is negative (> 1); default: no bound."""

    kl_coef: float = 0.0
    """Weight of the KL to the frozen starting model in the loss; 0 holds no reference model."""

    kl_type: Literal["k1", "k2", "k3"] = "k3"
    """KL estimator (Schulman): log ratio, half its square, or the unbiased positive one."""

    entropy_coef: float = 0.0
    """Weight of an entropy bonus in the loss."""

    loss_aggregation: Literal["token-mean", "sequence-mean"] = "token-mean"
    """Mean over all tokens of the update, or over its sequences' own means."""

    updates_per_rollout: int = 1
    """Optimizer updates made from one rollout, each on its own share of the groups."""

    old_logprobs: Literal["actor", "rollout"] = "actor"
    """Denominator of the ratio: the actor's own log-probs before the first update, or the rollout engine's."""

    importance_correction: Literal["off", "truncate", "mask"] = "off"
    """Weight tokens by actor / rollout probability: capped at the bound (truncate) or dropped outside it (mask)."""

    importance_bound: float = 2.0
    """Largest importance weight; mask also drops weights below its inverse."""

    def __post_init__(self) -> None:
        if not (0 <= self.clip_low < 1) or self.clip_high < 0:
            raise SettingsError(
                f"--clip-low must be in [0, 1) and --clip-high >= 0, got {self.clip_low:g} and {self.clip_high:g}"
            )
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise SettingsError(f"--dual-clip must be > 1, got {self.dual_clip:g}")
        if self.kl_coef < 0:
            raise SettingsError(f"--kl-coef must be >= 0, got {self.kl_coef:g}")
        if self.updates_per_rollout < 1:
            raise SettingsError(f"--updates-per-rollout must be >= 1, got {self.updates_per_rollout}")
        if self.importance_bound <= 1:
            raise SettingsError(f"--importance-bound must be > 1, got {self.importance_bound:g}")
        if self.importance_correction != "off" and self.old_logprobs == "rollout":
            raise SettingsError(
                "--importance-correction needs --old-logprobs actor: "
                "with rollout the ratio already starts at the engine's log-probs"
            )
