"""The GRPO loss as a whole."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from xrl.algorithms.aggregation import token_shares
from xrl.algorithms.grpo import GRPO
from xrl.config import AlgorithmConfig
from xrl.metrics.mean import merge
from xrl.types import LossInputs, LossOutput, Mean

EVERYTHING_ON = AlgorithmConfig(
    clip_high=0.28,
    dual_clip=3.0,
    kl_coef=0.1,
    entropy_coef=0.01,
    importance_correction="truncate",
    importance_bound=1.1,
)


def inputs(lengths, *, kind="token-mean", dtype=torch.float64, seed=0):
    """Random tokens of answers of the given lengths, all in one micro-batch; log-probs differ by about 0.3 nats."""
    generator = torch.Generator().manual_seed(seed)
    num = sum(lengths)

    def noise(scale):
        return scale * torch.randn(num, generator=generator, dtype=dtype)

    base = -torch.rand(num, generator=generator, dtype=dtype) * 3 - 0.5
    per_sample = torch.tensor(lengths, dtype=torch.int64)
    shares = torch.tensor(token_shares(lengths, kind), dtype=dtype).repeat_interleave(per_sample)
    advantages = torch.randn(len(lengths), generator=generator, dtype=dtype).repeat_interleave(per_sample)
    return LossInputs(
        logprobs=(base + noise(0.3)).requires_grad_(),
        entropy=noise(0.1).abs().requires_grad_(),
        old_logprobs=base,
        rollout_logprobs=base + noise(0.1),
        reference_logprobs=base + noise(0.3),
        advantages=advantages,
        token_shares=shares,
        sequence_ids=torch.arange(len(lengths)).repeat_interleave(per_sample),
        num_sequences=len(lengths),
    )


def cut(whole, start, end):
    """The tokens from start to end as a micro-batch of their own."""
    tensors = {name: value[start:end] for name, value in vars(whole).items() if isinstance(value, torch.Tensor)}
    found, sequence_ids = tensors["sequence_ids"].unique(return_inverse=True)
    return dataclasses.replace(whole, **tensors | {"sequence_ids": sequence_ids}, num_sequences=len(found))


def test_loss_matches_a_value_worked_out_by_hand():
    whole = LossInputs(
        logprobs=torch.log(torch.tensor([1.0, 2.0, 0.5]) * 0.1),
        entropy=torch.tensor([1.0, 2.0, 3.0]),
        old_logprobs=torch.log(torch.full((3,), 0.1)),
        rollout_logprobs=torch.log(torch.tensor([0.1, 0.1, 0.025])),  # importance 1, 1, 4 -> 1.5
        reference_logprobs=torch.log(torch.tensor([0.1, 0.1, 0.05])),  # log r: 0, -log 2, 0
        advantages=torch.tensor([1.0, 1.0, -2.0]),
        token_shares=torch.tensor([0.5, 0.25, 0.25]),
        sequence_ids=torch.tensor([0, 0, 1]),
        num_sequences=2,
    )
    config = AlgorithmConfig(kl_coef=2.0, entropy_coef=0.5, importance_correction="truncate", importance_bound=1.5)
    clipped = [-1.0, -1.2, 2 * 0.8]  # ratio 1; 2 capped at 1.2; 0.5 held at 0.8
    kl = [0.0, 0.5 - 1 + math.log(2), 0.0]
    per_token = [
        importance * surrogate + 2.0 * divergence - 0.5 * entropy
        for importance, surrogate, divergence, entropy in zip([1, 1, 1.5], clipped, kl, [1, 2, 3], strict=True)
    ]
    expected = 0.5 * per_token[0] + 0.25 * per_token[1] + 0.25 * per_token[2]
    output = GRPO(config).loss(whole)
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)
    values = {name: mean.value for name, mean in output.metrics.items()}
    assert values["loss"] == pytest.approx(expected, rel=1e-5)
    assert values["kl"] == pytest.approx(sum(kl) / 3, rel=1e-5)
    assert values["entropy"] == pytest.approx(2.0)
    assert values["ratio"] == pytest.approx(3.5 / 3)
    assert values["clip_fraction"] == pytest.approx(2 / 3)
    assert values["clip_fraction_low"] == values["clip_fraction_high"] == pytest.approx(1 / 3)
    assert values["clip_fraction_dual"] == 0
    assert values["mismatch"] == pytest.approx(math.log(4) / 3)
    assert values["importance/mean"] == pytest.approx(2.0)
    assert values["importance/bounded_fraction"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("kind", ["token-mean", "sequence-mean"])
@pytest.mark.parametrize("cuts", [[0, 13], [0, 5, 13], [0, 1, 1, 6, 12, 13]])
def test_any_cut_into_micro_batches_gives_the_same_loss_gradient_and_metrics(kind, cuts):
    whole = inputs([5, 1, 7], kind=kind)
    algorithm = GRPO(EVERYTHING_ON)
    expected = algorithm.loss(whole)
    (gradient,) = torch.autograd.grad(expected.loss, whole.logprobs)

    parts = [algorithm.loss(cut(whole, start, end)) for start, end in zip(cuts, cuts[1:], strict=False)]
    loss = torch.stack([part.loss for part in parts]).sum()
    torch.testing.assert_close(loss, expected.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss, whole.logprobs)[0], gradient, rtol=1e-12, atol=1e-12)
    metrics = parts[0].metrics
    for part in parts[1:]:
        metrics = merge(metrics, part.metrics)
    assert {name: mean.value for name, mean in metrics.items()} == pytest.approx(
        {name: mean.value for name, mean in expected.metrics.items()}, rel=1e-5
    )


def test_token_mean_is_the_plain_mean_over_tokens():
    whole = inputs([5, 1, 7])
    unweighted = -(whole.advantages * (whole.logprobs - whole.old_logprobs).exp())
    loss = GRPO(AlgorithmConfig(clip_low=0.999, clip_high=1e9)).loss(whole).loss
    torch.testing.assert_close(loss, unweighted.mean())


def test_sequence_mean_is_the_mean_over_answers_of_their_own_means():
    whole = inputs([5, 1, 7], kind="sequence-mean")
    unweighted = -(whole.advantages * (whole.logprobs - whole.old_logprobs).exp())
    means = torch.stack([answer.mean() for answer in unweighted.split([5, 1, 7])])
    loss = GRPO(AlgorithmConfig(clip_low=0.999, clip_high=1e9)).loss(whole).loss
    torch.testing.assert_close(loss, means.mean())


@pytest.mark.parametrize("kl_type", ["k1", "k2", "k3"])
def test_gradient_equals_finite_differences(kl_type):
    whole = inputs([5, 1, 7])
    algorithm = GRPO(dataclasses.replace(EVERYTHING_ON, kl_type=kl_type))

    def loss(logprobs, entropy):
        return algorithm.loss(dataclasses.replace(whole, logprobs=logprobs, entropy=entropy)).loss

    assert torch.autograd.gradcheck(loss, (whole.logprobs, whole.entropy))


@pytest.mark.parametrize("config", [AlgorithmConfig(), EVERYTHING_ON])
def test_no_tokens_give_a_zero_that_carries_a_gradient(config):
    whole = inputs([])
    output = GRPO(config).loss(whole)
    output.loss.backward()
    assert output.loss.item() == 0
    assert whole.logprobs.grad is not None
    assert all(float(mean.count) == 0 for mean in output.metrics.values())


def test_first_update_on_the_actors_own_log_probs_has_the_policy_gradient():
    whole = inputs([5, 1, 7])
    whole = dataclasses.replace(whole, old_logprobs=whole.logprobs.detach())
    output = GRPO(AlgorithmConfig()).loss(whole)
    (gradient,) = torch.autograd.grad(output.loss, whole.logprobs)
    assert torch.equal(gradient, -whole.token_shares * whole.advantages)
    assert output.metrics["ratio"].value == 1.0
    assert output.metrics["policy_kl"].value == 0.0
    assert output.metrics["clip_fraction"].value == 0.0


def test_mismatch_compares_the_engine_with_the_actor_that_is_known():
    whole = inputs([4, 4])
    by_old = GRPO(AlgorithmConfig()).loss(whole).metrics["mismatch"].value
    assert by_old == pytest.approx((whole.rollout_logprobs - whole.old_logprobs).abs().mean().item(), rel=1e-5)
    whole = dataclasses.replace(whole, old_logprobs=whole.rollout_logprobs)
    by_current = GRPO(AlgorithmConfig(old_logprobs="rollout")).loss(whole).metrics["mismatch"].value
    assert by_current == pytest.approx((whole.rollout_logprobs - whole.logprobs).abs().mean().item(), rel=1e-5)


def test_masked_tokens_keep_their_kl_and_lose_their_policy_gradient():
    whole = inputs([6])
    whole = dataclasses.replace(whole, rollout_logprobs=whole.old_logprobs - 5.0)
    config = AlgorithmConfig(kl_coef=0.5, importance_correction="mask")
    output = GRPO(config).loss(whole)
    assert output.metrics["importance/bounded_fraction"].value == 1.0
    assert output.loss.item() == pytest.approx(0.5 * output.metrics["kl"].value, rel=1e-5)


def test_terms_that_are_off_cost_no_backward_pass():
    whole = inputs([3])
    loss = GRPO(AlgorithmConfig()).loss(whole).loss
    assert torch.autograd.grad(loss, whole.entropy, allow_unused=True) == (None,)


def test_metrics_are_zero_dimensional_tensors_without_gradient():
    for mean in GRPO(EVERYTHING_ON).loss(inputs([2, 3])).metrics.values():
        assert isinstance(mean.total, torch.Tensor)
        assert isinstance(mean.count, torch.Tensor)
        assert mean.total.ndim == mean.count.ndim == 0
        assert not mean.total.requires_grad


def test_extreme_log_probs_give_a_finite_loss_and_gradient():
    extreme = torch.tensor([-1e4, 0.0, -1e4, 0.0])
    whole = LossInputs(
        logprobs=extreme.clone().requires_grad_(),
        entropy=torch.zeros(4),
        old_logprobs=extreme.flip(0),
        rollout_logprobs=extreme,
        reference_logprobs=extreme.flip(0),
        advantages=torch.tensor([1.0, 1.0, -1.0, -1.0]),
        token_shares=torch.full((4,), 0.25),
        sequence_ids=torch.tensor([0, 0, 1, 1]),
        num_sequences=2,
    )
    output = GRPO(AlgorithmConfig(kl_coef=0.1)).loss(whole)
    output.loss.backward()
    assert output.loss.isfinite()
    assert whole.logprobs.grad is not None
    assert whole.logprobs.grad.isfinite().all()
    assert all(math.isfinite(mean.value) for mean in output.metrics.values())


def test_kl_without_reference_log_probs_is_refused():
    whole = dataclasses.replace(inputs([3]), reference_logprobs=None)
    with pytest.raises(ValueError, match="needs reference_logprobs"):
        GRPO(AlgorithmConfig(kl_coef=0.1)).loss(whole)
    assert "kl" not in GRPO(AlgorithmConfig()).loss(whole).metrics


def test_a_tensor_that_would_broadcast_is_refused_by_name():
    whole = inputs([3])
    with pytest.raises(ValueError, match=r"advantages must be \[R\] = \[3\]"):
        GRPO(AlgorithmConfig()).loss(dataclasses.replace(whole, advantages=torch.ones(1)))


def test_a_loss_of_ones_own_is_not_replaced_by_the_fused_one() -> None:
    class Own(GRPO):
        def loss(self, inputs: LossInputs) -> LossOutput:
            return super().loss(inputs)

    assert GRPO(AlgorithmConfig()).fused_loss == AlgorithmConfig()
    assert Own(AlgorithmConfig()).fused_loss is None


class GSPO(GRPO):
    """Group Sequence Policy Optimization (arXiv:2507.18071), of what every loss is given."""

    def loss(self, inputs: LossInputs) -> LossOutput:
        ones = torch.ones_like(inputs.logprobs)
        means = inputs.sum_over_answers(inputs.logprobs - inputs.old_logprobs) / inputs.sum_over_answers(ones)
        ratio = means.exp()[inputs.sequence_ids]
        surrogate = torch.maximum(-inputs.advantages * ratio, -inputs.advantages * ratio.clamp(0.9, 1.1))
        loss = (inputs.token_shares * surrogate).sum()
        return LossOutput(loss=loss, metrics={"loss": Mean(loss.detach(), inputs.token_shares.sum())})


@pytest.mark.parametrize("cuts", [[0, 5, 13], [0, 6, 13], [0, 5, 6, 13]])
def test_a_loss_over_whole_answers_is_the_same_at_any_cut_between_answers(cuts):
    whole = inputs([5, 1, 7], kind="sequence-mean")
    expected = GSPO(AlgorithmConfig()).loss(whole).loss
    (gradient,) = torch.autograd.grad(expected, whole.logprobs)
    parts = [GSPO(AlgorithmConfig()).loss(cut(whole, *ends)).loss for ends in itertools.pairwise(cuts)]
    loss = torch.stack(parts).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss, whole.logprobs)[0], gradient, rtol=1e-12, atol=1e-12)
    differences = (whole.logprobs - whole.old_logprobs).split([5, 1, 7])
    ratios = torch.stack([difference.mean().exp() for difference in differences])
    advantages = whole.advantages[[0, 5, 6]]
    by_hand = torch.maximum(-advantages * ratios, -advantages * ratios.clamp(0.9, 1.1)).mean()
    torch.testing.assert_close(expected, by_hand)


def test_an_answer_without_trained_tokens_sums_to_zero():
    whole = dataclasses.replace(inputs([2, 1]), num_sequences=3)
    found = whole.sum_over_answers(torch.tensor([1.0, 2.0, 4.0]))
    assert found.tolist() == [3.0, 4.0, 0.0]
