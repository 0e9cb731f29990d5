"""The GRPO loss of single tokens as the kernels take it: settings as numbers, outputs as rows of one tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from xrl.config import AlgorithmConfig

KL_TYPES = ("none", "k1", "k2", "k3")
IMPORTANCE_KINDS = ("off", "truncate", "mask")

# The rows of `Backend.grpo_rows`' result. The first three are multiplied by the token's weight.
ROW_OUTPUTS = (
    "token_loss",
    "grad_logprob",
    "grad_entropy",
    "ratio",
    "kl",
    "importance",
    "clipped_low",
    "clipped_high",
    "clipped_dual",
    "importance_bounded",
)


@dataclass(frozen=True, kw_only=True)
class GrpoRowParams:
    """The settings of `xrl.algorithms.token_terms` that a kernel needs, as numbers."""

    clip_low: float
    clip_high: float
    dual_clip: float  # 0: off
    kl_type: int  # place in KL_TYPES
    kl_coef: float
    entropy_coef: float
    importance: int  # place in IMPORTANCE_KINDS
    importance_bound: float
    importance_from_current: bool  # the weight's numerator is the current log-prob, not the old one

    @classmethod
    def of(cls, config: AlgorithmConfig, *, with_reference: bool) -> GrpoRowParams:
        """The numbers of some settings; without reference log-probs there is no KL."""
        return cls(
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip or 0.0,
            kl_type=KL_TYPES.index(config.kl_type) if with_reference else 0,
            kl_coef=config.kl_coef,
            entropy_coef=config.entropy_coef,
            importance=IMPORTANCE_KINDS.index(config.importance_correction),
            importance_bound=config.importance_bound,
            importance_from_current=config.old_logprobs == "rollout",
        )

    def as_numbers(self) -> list[float]:
        """The fields in their order: what an op of a compiled graph can be given."""
        return [float(value) for value in dataclasses.astuple(self)]

    @classmethod
    def from_numbers(cls, values: Sequence[float]) -> GrpoRowParams:
        """From what `as_numbers` gives."""
        kinds = {"float": float, "int": int, "bool": bool}
        fields = zip(dataclasses.fields(cls), values, strict=True)
        return cls(**{field.name: kinds[str(field.type)](value) for field, value in fields})

    def bounds(self) -> tuple[float, float, float, float]:
        """Lowest and highest ratio, lowest and highest importance weight: worked out once, in full precision.

        Rounded to fp32 these are what PyTorch compares with; 1 - clip_low in fp32 may be its neighbour.
        """
        return 1.0 - self.clip_low, 1.0 + self.clip_high, 1.0 / self.importance_bound, self.importance_bound

    def as_tuple(self) -> tuple[float | int | bool, ...]:
        """As the compiled kernels take them: see csrc/grpo_params.h."""
        return (
            *self.bounds(),
            self.dual_clip,
            self.kl_type,
            self.kl_coef,
            self.entropy_coef,
            self.importance,
            self.importance_from_current,
        )
