"""The GRPO loss of single tokens as the kernels take it: settings as numbers, outputs as rows of one tensor."""

from __future__ import annotations

from collections.abc import Sequence

from xrl.algorithms.loss_settings import TokenLossSettings

# Kinds by their number in the kernels: see csrc/grpo_row.h.
KL_TYPES = ("none", "k1", "k2", "k3")
IMPORTANCE_KINDS = ("off", "truncate", "mask")

# The rows of `Backend.grpo_rows`' result. The first three are multiplied by the token's share.
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
# Of `SinglePassBackend.grpo_single_pass`.
SINGLE_PASS_OUTPUTS = ("logprob", "entropy", *ROW_OUTPUTS)


def as_numbers(settings: TokenLossSettings) -> list[float]:
    """The settings as numbers, which an op of a compiled graph can be given; `from_numbers` undoes it."""
    return [
        float(settings.clip_low),
        float(settings.clip_high),
        float(settings.dual_clip or 0.0),
        float(settings.kl_coef),
        float(KL_TYPES.index(settings.kl_type)),
        float(settings.entropy_coef),
        float(IMPORTANCE_KINDS.index(settings.importance_correction)),
        float(settings.importance_bound),
        float(settings.importance_from_current),
    ]


def from_numbers(numbers: Sequence[float]) -> TokenLossSettings:
    """The settings that `as_numbers` made numbers of."""
    clip_low, clip_high, dual_clip, kl_coef, kl_type, entropy_coef, importance, bound, from_current = numbers
    return TokenLossSettings(
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip or None,
        kl_coef=kl_coef,
        kl_type=KL_TYPES[int(kl_type)],  # type: ignore[arg-type]
        entropy_coef=entropy_coef,
        importance_correction=IMPORTANCE_KINDS[int(importance)],  # type: ignore[arg-type]
        importance_bound=bound,
        importance_from_current=bool(from_current),
    )


def bounds(settings: TokenLossSettings) -> tuple[float, float, float, float]:
    """Lowest and highest ratio, lowest and highest importance weight: worked out once, in full precision.

    Rounded to fp32 these are what PyTorch compares with; 1 - clip_low in fp32 may be its neighbour.
    """
    return (
        1.0 - settings.clip_low,
        1.0 + settings.clip_high,
        1.0 / settings.importance_bound,
        settings.importance_bound,
    )


def native_settings(settings: TokenLossSettings, *, with_reference: bool) -> tuple[float | int | bool, ...]:
    """The settings as the compiled kernels take them (csrc/grpo_params.h); without reference log-probs no KL."""
    return (
        *bounds(settings),
        settings.dual_clip or 0.0,
        KL_TYPES.index(settings.kl_type) if with_reference else 0,
        settings.kl_coef,
        settings.entropy_coef,
        IMPORTANCE_KINDS.index(settings.importance_correction),
        settings.importance_from_current,
    )
