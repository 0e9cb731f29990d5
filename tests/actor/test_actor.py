"""A tiny policy in this process: scored, updated, read out. Layouts of several ranks are tests/distributed's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.samples import response_of, sample
from tests.tiny_models import make_checkpoint
from xrl.parallel.cpu import prepare_megatron_for_cpu

prepare_megatron_for_cpu()

from xrl.actor.actor import Actor, UpdateReport  # noqa: E402
from xrl.algorithms.grpo import GRPO  # noqa: E402
from xrl.config import (  # noqa: E402
    AlgorithmConfig,
    ModelConfig,
    OptimizerConfig,
    PackingConfig,
    ParallelConfig,
)
from xrl.metrics.mean import Mean  # noqa: E402
from xrl.parallel.groups import ParallelGroups  # noqa: E402
from xrl.parallel.megatron import initialize, shutdown  # noqa: E402
from xrl.types import LossInputs, LossOutput, Sample  # noqa: E402

# Two answers to each of three prompts; log-probs are nobody's.
SAMPLES = [
    sample([5, 6, 7], [11, 12, 13, 2], advantage=1.0, group_id=0, temperature=0.7),
    sample([5, 6, 7], [14, 2], advantage=-1.0, group_id=0, temperature=0.7),
    sample([8, 9], [15], advantage=0.5, group_id=1, temperature=0.7),
    sample([8, 9], [16, 17, 2], advantage=-0.5, group_id=1, temperature=0.7),
    sample([10], [18, 2], advantage=0.75, group_id=2, temperature=0.7),
    sample([10], [19, 20, 21, 22, 2], advantage=-0.75, group_id=2, temperature=0.7),
]
NUM_TOKENS = sum(len(each.token_ids) for each in SAMPLES)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=2, with_tokenizer=False)


@pytest.fixture(scope="module")
def groups() -> Iterator[ParallelGroups]:
    yield initialize(ParallelConfig(), seed=1)
    shutdown()


@pytest.fixture
def make_actor(checkpoint: Path, groups: ParallelGroups):
    def make(
        *,
        optimizer: dict[str, Any] | None = None,
        packing: dict[str, Any] | None = None,
        keeps_reference: bool = False,
    ) -> Actor:
        return Actor(
            model=ModelConfig(model=checkpoint, bf16=False),
            parallel=ParallelConfig(),
            optimizer=OptimizerConfig(**{"lr": 1e-3, "adam_eps": 1e-6, **(optimizer or {})}),
            packing=PackingConfig(**(packing or {})),
            groups=groups,
            num_updates=10,
            keeps_reference=keeps_reference,
        )

    return make


class Own(GRPO):
    """The same loss, which kernels may not stand in for."""

    def loss(self, inputs: LossInputs) -> LossOutput:
        return super().loss(inputs)


def update(
    actor: Actor, samples: Sequence[Sample] = SAMPLES, *, fused: bool = True, **algorithm: Any
) -> list[UpdateReport]:
    return actor.learn(samples, (GRPO if fused else Own)(AlgorithmConfig(**algorithm)))


def tensors(actor: Actor) -> dict[str, Tensor]:
    """The weights as they are published."""
    return {name: tensor.clone() for each in actor.weights(version=1) for name, tensor in each.tensors.items()}


def scored(actor: Actor, samples: Sequence[Sample] = SAMPLES, **options: Any) -> list[list[float]]:
    """The actor's log-probs of each sample's response tokens."""
    microbatches = [actor.microbatches.make([each], [0.0]) for each in samples]
    return [found.tolist() for found in actor.logprobs(microbatches, **options)]


def by_the_actor(actor: Actor) -> list[Sample]:
    """The samples with the actor's own log-probs, as if it had sampled them."""
    pairs = zip(SAMPLES, scored(actor), strict=True)
    return [with_logprobs(each, logprobs) for each, logprobs in pairs]


def with_logprobs(each: Sample, logprobs: Sequence[float]) -> Sample:
    values = np.zeros(len(each.token_ids), np.float32)
    values[each.trained] = logprobs
    return dataclasses.replace(each, rollout_logprobs=values)


def test_an_update_reports_what_it_learned_from(make_actor) -> None:
    actor = make_actor(packing={"share_prompt_prefix": False})
    (report,) = update(actor)
    assert report.num_tokens == NUM_TOKENS
    assert report.computed_tokens == NUM_TOKENS - len(SAMPLES)  # an answer's last token predicts nothing
    assert report.lr == 1e-3
    assert report.grad_norm > 0
    assert list(report.metrics) == [
        *("entropy", "ratio", "policy_kl", "clip_fraction", "clip_fraction_low", "clip_fraction_high"),
        *("clip_fraction_dual", "mismatch", "mismatch_kl", "loss"),
    ]
    assert report.metrics["entropy"].count == sum(len(response_of(each)) for each in SAMPLES)
    assert list(actor.seconds) == ["logprobs", "update"]


def test_prompts_that_are_shared_are_computed_once(make_actor) -> None:
    (report,) = update(make_actor())
    assert report.num_tokens == NUM_TOKENS
    assert report.computed_tokens == NUM_TOKENS - len(SAMPLES) - (3 + 2 + 1)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("packing", [{"share_prompt_prefix": False}, {"micro_batch_size": 2}, {}])
def test_the_loss_and_its_gradient_do_not_depend_on_how_they_are_computed(
    make_actor, packing: dict[str, Any], fused: bool
) -> None:
    several = {"kl_coef": 0.05, "entropy_coef": 0.01, "old_logprobs": "rollout"}
    (expected,) = update(make_actor(keeps_reference=True), fused=False, **several)
    (found,) = update(make_actor(packing=packing, keeps_reference=True), fused=fused, **several)
    assert found.metrics["loss"].value == pytest.approx(expected.metrics["loss"].value, rel=1e-5)
    assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)


def test_the_first_update_starts_from_the_actor_s_own_log_probs(make_actor) -> None:
    (report,) = update(make_actor())
    assert report.metrics["ratio"].value == 1.0
    # Each token counts the same: the loss is minus their mean advantage.
    tokens = [float(value) for each in SAMPLES for value in each.advantages[each.trained]]
    assert report.metrics["loss"].value == pytest.approx(-sum(tokens) / len(tokens), rel=1e-5)


def test_later_updates_of_a_rollout_are_measured_from_before_the_first(make_actor) -> None:
    first_part = [each for each in SAMPLES if each.group_id != 1]
    second_part = [each for each in SAMPLES if each.group_id == 1]
    first, second = update(make_actor(optimizer={"lr": 1e-2}), updates_per_rollout=2)
    assert first.metrics["ratio"].value == pytest.approx(1.0, abs=1e-5)
    other = make_actor(optimizer={"lr": 1e-2})
    before = scored(other, second_part)
    update(other, first_part)
    pairs = zip(chain(*before), chain(*scored(other, second_part)), strict=True)
    ratios = [math.exp(now - then) for then, now in pairs]
    assert second.metrics["ratio"].value == pytest.approx(sum(ratios) / len(ratios), rel=1e-4)
    assert abs(second.metrics["ratio"].value - 1.0) > 1e-3


def test_updates_take_whole_groups_in_turn(make_actor) -> None:
    reports = update(make_actor(), updates_per_rollout=2)
    sizes = [0, 0, 0]
    for each in SAMPLES:
        sizes[each.group_id] += len(each.token_ids)
    assert [report.num_tokens for report in reports] == [sizes[0] + sizes[2], sizes[1]]


def test_fewer_groups_than_updates_make_fewer_updates(make_actor) -> None:
    assert len(update(make_actor(), updates_per_rollout=5)) == 3


def test_no_samples_make_no_update_and_change_no_weight(make_actor) -> None:
    actor = make_actor()
    before = tensors(actor)
    assert update(actor, [], updates_per_rollout=2) == []
    after = tensors(actor)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_with_the_engine_s_log_probs_as_denominator_the_ratio_is_to_them(make_actor) -> None:
    actor = make_actor()
    own = by_the_actor(actor)
    halved = [with_logprobs(each, each.rollout_logprobs[each.trained] + math.log(0.5)) for each in own]
    (report,) = update(actor, halved, old_logprobs="rollout")
    assert report.metrics["ratio"].value == pytest.approx(2.0, rel=1e-5)


def test_the_learning_rate_rises_over_the_first_updates_of_the_run(make_actor) -> None:
    actor = make_actor(optimizer={"lr": 1e-3, "lr_warmup_iters": 4})
    rates = [report.lr for _ in range(3) for report in update(actor, updates_per_rollout=2)]
    assert rates == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3, 1e-3, 1e-3])


def test_an_actor_that_sampled_its_samples_has_no_mismatch_with_them(make_actor) -> None:
    actor = make_actor()
    assert actor.mismatch(by_the_actor(actor)) == [0.0] * len(SAMPLES)


def test_the_mismatch_of_each_sample_is_its_mean_difference(make_actor) -> None:
    actor = make_actor()
    first, second, *_ = by_the_actor(actor)
    first = with_logprobs(first, first.rollout_logprobs[first.trained] + 0.5)
    second = with_logprobs(second, second.rollout_logprobs[second.trained] - [1, 0])
    assert actor.mismatch([first, second]) == pytest.approx([0.5, 0.5], abs=1e-5)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_mismatch_that_is_no_number_is_infinite(make_actor, wrong: float) -> None:
    broken = sample([5, 6], [11, 2], logprobs=[wrong, -1.0])
    assert make_actor().mismatch([broken])[0] == math.inf


def test_of_no_samples_there_is_no_mismatch(make_actor) -> None:
    assert make_actor().mismatch([]) == []


def test_a_mismatch_is_measured_without_learning(make_actor) -> None:
    actor = make_actor()
    before = tensors(actor)
    actor.mismatch(SAMPLES)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(actor).items())


def test_the_reference_stays_what_the_run_started_from(make_actor) -> None:
    actor = make_actor(keeps_reference=True)
    start = scored(actor)
    (report,) = update(actor, kl_coef=0.1)
    assert report.metrics["kl"].value == pytest.approx(0.0, abs=1e-9)
    moved = scored(actor)
    assert scored(actor, weights="reference") == start
    assert moved != start
    assert scored(actor) == moved  # its own weights are back
    (report,) = update(actor, kl_coef=0.1)
    assert report.metrics["kl"].value > 1e-6


def test_a_kl_needs_a_reference(make_actor) -> None:
    assert make_actor().reference is None
    with pytest.raises(ValueError, match="kl_coef is 0.1, which needs an actor that keeps a reference"):
        update(make_actor(), kl_coef=0.1)


@pytest.mark.parametrize("clip_grad", [1.0, 0.0])
def test_an_update_of_weights_that_are_no_numbers_ends_the_run(make_actor, clip_grad: float) -> None:
    actor = make_actor(optimizer={"clip_grad": clip_grad})
    with torch.no_grad():
        next(actor.model.parameters()).fill_(math.nan)
    with pytest.raises(RuntimeError, match=r"the update's loss is nan and its gradient norm .*lower --lr.*saved"):
        update(actor)


def told_as_nan(inputs: LossInputs) -> LossOutput:
    """A loss that is no number, of which nothing reaches a weight."""
    return LossOutput(loss=0 * inputs.logprobs.sum(), metrics={"loss": Mean(math.nan, 1.0)})


def with_a_gradient_of_nan(inputs: LossInputs) -> LossOutput:
    """0, whose gradient is infinity times 0."""
    loss = (0 * inputs.logprobs).sqrt().sum()
    return LossOutput(loss=loss, metrics={"loss": Mean(loss.detach(), 1.0)})


@pytest.mark.parametrize(
    ("loss", "words"),
    [(told_as_nan, "loss is nan and its gradient norm 0.0"), (with_a_gradient_of_nan, "loss is -?0.0 and its .* nan")],
)
def test_a_loss_or_a_gradient_that_is_no_number_is_enough(make_actor, loss: Any, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        make_actor().learn(
            SAMPLES, type("Broken", (GRPO,), {"loss": lambda self, inputs: loss(inputs)})(AlgorithmConfig())
        )


def test_an_advantage_that_is_no_number_ends_the_run(make_actor) -> None:
    first = SAMPLES[0]
    with pytest.raises(RuntimeError, match="the update's loss is nan"):
        update(make_actor(), [dataclasses.replace(first, advantages=first.advantages * math.nan), *SAMPLES[1:]])


def test_weights_come_out_under_the_names_and_with_the_bits_of_the_checkpoint(make_actor, checkpoint: Path) -> None:
    actor = make_actor()
    buckets = [(each.part, each.version) for each in actor.weights(version=7)]
    assert buckets == [("embeddings", 7), ("layers.0", 7), ("layers.1", 7), ("final", 7)]
    expected, found = load_file(checkpoint / "model.safetensors"), tensors(actor)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_an_update_moves_the_weights_that_come_out(make_actor) -> None:
    actor = make_actor()
    before = tensors(actor)
    update(actor)
    moved = [name for name, tensor in tensors(actor).items() if not torch.equal(tensor, before[name])]
    assert len(moved) == len(before)


def test_an_actor_learns_from_the_same_samples_as_if_it_had_never_left_the_device(make_actor) -> None:
    one, other = make_actor(keeps_reference=True), make_actor(keeps_reference=True)
    for _ in range(2):
        other.memory.offload()
        other.memory.restore()
        assert update(one, kl_coef=0.1)[0].metrics["loss"] == update(other, kl_coef=0.1)[0].metrics["loss"]
    left, right = tensors(one), tensors(other)
    assert all(torch.equal(left[name], right[name]) for name in left)
