"""GRPO: group-relative advantages, a clipped surrogate, KL and entropy terms (arXiv:2402.03300)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from xrl.algorithms.advantages import group_advantages
from xrl.algorithms.aggregation import token_shares
from xrl.algorithms.clipped import ClippedSurrogate
from xrl.algorithms.importance import TokenImportance, mismatch, mismatch_kl
from xrl.algorithms.kl import k3
from xrl.algorithms.loss_settings import TokenLossSettings
from xrl.algorithms.scored import Scored
from xrl.algorithms.scoring import is_comparable, score_groups
from xrl.algorithms.token_terms import token_terms
from xrl.config import AlgorithmConfig
from xrl.types import Group, LossInputs, LossOutput, Mean, SampleSize


class GRPO:
    """Group Relative Policy Optimization and its common variants, by switch (see AlgorithmConfig)."""

    def __init__(self, config: AlgorithmConfig) -> None:
        self.settings = config
        # A subclass with a loss of its own must not have it replaced.
        self.fused_loss = config if type(self).loss is GRPO.loss else None

    def score(self, groups: Sequence[Group]) -> Scored:
        """Fill in advantages; leave out what cannot be learned from, and count it."""
        return score_groups(
            groups,
            self.advantages,
            keep=self.keep,
        )

    def advantages(self, rewards: Sequence[float]) -> list[float]:
        """[G] rewards of the answers to one prompt, G >= 2 -> [G] advantages, which need not sum to 0.

        For a subclass to replace.
        """
        return group_advantages(rewards, normalize=self.settings.normalize_advantages)

    def keep(self, group: Group) -> bool:
        """Whether a group is learned from: two answers to compare and, unless told otherwise, different rewards."""
        return is_comparable(group, filter_zero_variance=self.settings.filter_zero_variance)

    def token_shares(self, sizes: Sequence[SampleSize]) -> Sequence[float]:
        """As `--loss-aggregation` says, over the whole update."""
        return token_shares([size.num_trained for size in sizes], self.settings.loss_aggregation)

    def loss(self, inputs: LossInputs) -> LossOutput:
        """One micro-batch's share of the loss.

            loss = sum_t s_t * (i_t * clipped_t + kl_coef * kl_t - entropy_coef * entropy_t)

        s are the shares of `aggregation.token_shares`, so losses of micro-batches and ranks are summed, never
        averaged. i are the importance weights. R = 0 gives a zero that still carries a gradient: every rank must
        take part in the backward pass.

        Raises:
            ValueError: the inputs are not all [R], or the KL is in the loss and there are no reference log-probs.
        """
        config = self.settings
        _check(inputs)
        terms = token_terms(
            logprobs=inputs.logprobs,
            entropy=inputs.entropy,
            old_logprobs=inputs.old_logprobs,
            rollout_logprobs=inputs.rollout_logprobs,
            reference_logprobs=inputs.reference_logprobs,
            advantages=inputs.advantages,
            settings=TokenLossSettings.of(config),
        )
        metrics = {
            **_policy_metrics(inputs, terms.surrogate),
            **_mismatch_metrics(terms.actor_logprobs, inputs.rollout_logprobs),
        }
        if config.importance_correction != "off":
            metrics |= _importance_metrics(terms.importance)
        if terms.kl is not None:
            metrics["kl"] = token_mean(terms.kl)
        loss = (inputs.token_shares * terms.loss).sum()
        # The shares sum to 1 over an update: merged over micro-batches, ranks and updates, this is the mean loss.
        metrics["loss"] = Mean(loss.detach(), inputs.token_shares.detach().sum())
        return LossOutput(loss=loss, metrics=metrics)


def token_mean(values: Tensor) -> Mean:
    """The mean of [R] values over tokens, not divided yet; 0-d tensors on the values' device."""
    values = values.detach().float()
    return Mean(values.sum(), values.new_full((), values.numel()))


def _policy_metrics(inputs: LossInputs, surrogate: ClippedSurrogate) -> dict[str, Mean]:
    clipped = surrogate.clipped_low | surrogate.clipped_high | surrogate.clipped_dual
    return {
        "entropy": token_mean(inputs.entropy),
        "ratio": token_mean(surrogate.ratio),
        "policy_kl": token_mean(k3(inputs.old_logprobs.detach(), inputs.logprobs.detach())),
        "clip_fraction": token_mean(clipped),
        "clip_fraction_low": token_mean(surrogate.clipped_low),
        "clip_fraction_high": token_mean(surrogate.clipped_high),
        "clip_fraction_dual": token_mean(surrogate.clipped_dual),
    }


def _mismatch_metrics(actor_logprobs: Tensor, rollout_logprobs: Tensor) -> dict[str, Mean]:
    return {
        "mismatch": token_mean(mismatch(actor_logprobs, rollout_logprobs)),
        "mismatch_kl": token_mean(mismatch_kl(actor_logprobs, rollout_logprobs)),
    }


def _importance_metrics(importance: TokenImportance) -> dict[str, Mean]:
    return {
        "importance/mean": token_mean(importance.raw),
        "importance/bounded_fraction": token_mean(importance.bounded),
    }


def _check(inputs: LossInputs) -> None:
    """A [1] or [R, 1] tensor would broadcast to a wrong loss without a word."""
    shape = inputs.logprobs.shape
    if inputs.logprobs.ndim != 1:
        raise ValueError(f"logprobs must be [R], got {list(shape)}")
    for name in ("entropy", "old_logprobs", "rollout_logprobs", "reference_logprobs", "advantages", "token_shares"):
        tensor = getattr(inputs, name)
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be [R] = {list(shape)} like logprobs, got {list(tensor.shape)}")
