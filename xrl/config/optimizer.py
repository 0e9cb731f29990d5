"""Adam and its schedule. Names are Megatron's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from xrl.config.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, gradient clipping and the learning-rate schedule."""

    lr: float = 1e-6
    """Highest learning rate."""

    min_lr: float = 0.0
    """Learning rate the decay ends at."""

    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls after the warm-up."""

    lr_warmup_iters: int = 0
    """Updates over which the learning rate rises: update i of n has lr * i / n, so that the first one learns too."""

    lr_decay_iters: int | None = None
    """Updates after which --min-lr is reached; default: the whole run."""

    weight_decay: float = 0.0
    """Decoupled weight decay."""

    adam_beta1: float = 0.9
    """Adam's first-moment decay."""

    adam_beta2: float = 0.98
    """Adam's second-moment decay."""

    adam_eps: float = 1e-8
    """Added to Adam's denominator."""

    clip_grad: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""

    def __post_init__(self) -> None:
        if self.lr < 0 or self.min_lr < 0 or self.min_lr > self.lr:
            raise SettingsError(f"--lr and --min-lr need 0 <= min-lr <= lr, got lr {self.lr:g}, min-lr {self.min_lr:g}")
        if self.lr_warmup_iters < 0 or (self.lr_decay_iters is not None and self.lr_decay_iters < 1):
            raise SettingsError(
                f"--lr-warmup-iters must be >= 0 and --lr-decay-iters >= 1, "
                f"got {self.lr_warmup_iters} and {self.lr_decay_iters}"
            )
        if self.clip_grad < 0 or self.weight_decay < 0 or self.adam_eps <= 0:
            raise SettingsError(
                f"--clip-grad and --weight-decay must be >= 0 and --adam-eps > 0, "
                f"got {self.clip_grad:g}, {self.weight_decay:g} and {self.adam_eps:g}"
            )
        if not (0 <= self.adam_beta1 < 1 and 0 <= self.adam_beta2 < 1):
            raise SettingsError(
                f"--adam-beta1 and --adam-beta2 must be in [0, 1), got {self.adam_beta1:g} and {self.adam_beta2:g}"
            )
