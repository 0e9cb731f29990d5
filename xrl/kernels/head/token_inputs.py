"""What the GRPO loss takes for each token, besides its logits.

Shapes: R tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xrl.algorithms.loss_settings import TokenLossSettings
from xrl.kernels.arguments import check_instance, check_no_gradient


@dataclass(frozen=True, kw_only=True)
class TokenInputs:
    """One number a token, all [R] fp32 and without a gradient."""

    advantages: Tensor
    shares: Tensor | None = None  # of the token in the loss, bool too; 0 masks it; None: ones
    old_logprobs: Tensor | None = None  # denominator of the ratio; None: the current ones, so that the ratio is 1
    rollout_logprobs: Tensor | None = None  # from the engine, for importance weights; None: they are 1
    reference_logprobs: Tensor | None = None  # of the frozen model, for the KL; None: there is no KL

    def tensors(self) -> list[Tensor | None]:
        """The fields in their order: what an op of a compiled graph can be given."""
        return [self.advantages, self.shares, self.old_logprobs, self.rollout_logprobs, self.reference_logprobs]

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None]) -> TokenInputs:
        """Make inputs of what `tensors` gives."""
        advantages, shares, old, rollout, reference = tensors
        assert advantages is not None
        return cls(
            advantages=advantages,
            shares=shares,
            old_logprobs=old,
            rollout_logprobs=rollout,
            reference_logprobs=reference,
        )

    def select(self, rows: Tensor | slice) -> TokenInputs:
        """The inputs of some tokens, [C]."""
        return TokenInputs.of([None if tensor is None else tensor[rows] for tensor in self.tensors()])


def check_token_inputs(
    tokens: TokenInputs, settings: TokenLossSettings, *, num_rows: int, device: torch.device
) -> TokenInputs:
    """Check the inputs; returns them with a share for each token: 1 where none were given.

    Raises:
        ValueError: naming the tensor, its shape and what was expected; or one that the settings need is missing, or
            one wants a gradient, which there is none of.
        TypeError: what should be a tensor is none.
    """
    check_instance("tokens", tokens, TokenInputs)
    check_instance("settings", settings, TokenLossSettings)
    advantages, shares, old, rollout, reference = tokens.tensors()
    named = {
        "advantages": advantages,
        "shares": shares,
        "old_logprobs": old,
        "rollout_logprobs": rollout,
        "reference_logprobs": reference,
    }
    for name, tensor in named.items():
        if tensor is not None or name == "advantages":
            check_instance(name, tensor, Tensor)
    assert advantages is not None
    if shares is not None and (shares.shape != (num_rows,) or shares.is_complex()):
        raise ValueError(f"shares must be fp32 [R] = [{num_rows}], got {shares.dtype} {list(shares.shape)}")
    check_no_gradient("the loss", **named)
    named["shares"] = torch.ones_like(advantages) if shares is None else shares.to(advantages.dtype)
    for name, tensor in named.items():
        if tensor is None:
            continue
        if tensor.shape != (num_rows,) or tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} must be fp32 [R] = [{num_rows}], got {tensor.dtype} {list(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{name} are on {tensor.device}, not on {device}: they must be on one device")
    if settings.kl_coef and reference is None:
        raise ValueError(f"kl_coef is {settings.kl_coef:g}, which needs reference_logprobs, got None")
    if settings.importance_correction != "off" and rollout is None:
        raise ValueError(
            f"importance_correction is {settings.importance_correction}, which needs rollout_logprobs, got None"
        )
    return TokenInputs.of(list(named.values()))
