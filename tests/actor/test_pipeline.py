"""Micro-batches through megatron-core's schedule of one stage, with a model of two numbers a token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from tests.ranks import groups
from xrl.parallel.cpu import prepare_megatron_for_cpu

prepare_megatron_for_cpu()

from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from xrl.actor.microbatch import Microbatch  # noqa: E402
from xrl.actor.pipeline import Pipeline  # noqa: E402
from xrl.config import ParallelConfig  # noqa: E402
from xrl.launch.progress import Progress  # noqa: E402
from xrl.metrics.mean import Mean  # noqa: E402
from xrl.models.head import ResponseRows  # noqa: E402
from xrl.parallel.megatron import initialize, shutdown  # noqa: E402
from xrl.types import LossOutput  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def alone() -> Iterator[None]:
    initialize(ParallelConfig(), seed=1)  # the schedule asks megatron-core for its groups
    yield
    shutdown()


class TwoNumbers(nn.Module):
    """Gives a token its number times a weight, and its position: at the head's rows, or at every place."""

    model_type = ModelType.encoder_or_decoder

    def __init__(self, head: ResponseRows) -> None:
        super().__init__()
        self.config = TransformerConfig(num_layers=1, hidden_size=4, num_attention_heads=1)
        self.head = head
        self.weight = nn.Parameter(torch.tensor(1.0))
        self.modes: list[tuple[bool, bool]] = []  # of each pass: training, and with gradients

    def set_input_tensor(self, _: object) -> None:
        """The first stage has none."""

    def forward(self, *, input_ids: Tensor, position_ids: Tensor, **_: Any) -> Tensor:
        self.modes.append((self.training, torch.is_grad_enabled()))
        output = torch.stack([input_ids * self.weight, position_ids.float()], dim=-1)  # [B, S, 2]
        if self.head.rows is None:
            return output
        return output.transpose(0, 1).flatten(0, 1)[self.head.rows].unsqueeze(0)  # [1, R, 2]


def microbatch(token_ids: Sequence[Sequence[int]], rows: Sequence[int]) -> Microbatch:
    ids = torch.tensor(token_ids)
    none = torch.empty(0)
    return Microbatch(
        input_ids=ids,
        position_ids=torch.arange(ids.shape[1]).expand_as(ids),
        attention=None,
        rows=torch.tensor(rows, dtype=torch.long),
        response_ids=none,
        rollout_logprobs=none,
        advantages=none,
        token_shares=none,
        sequence_ids=none.long(),
        num_sequences=0,
        temperature=1.0,
        num_tokens=ids.numel(),
    )


# The second one is of a replica that is short of samples; the third is padded, its rows count [S, B].
MICROBATCHES = [microbatch([[3, 4, 5]], [1, 2]), microbatch([[0]], []), microbatch([[6, 7], [8, 9]], [1, 2])]


def pipeline(*, data_parallel_size: int = 1, progress: Progress | None = None) -> tuple[Pipeline, TwoNumbers]:
    head = ResponseRows(sequence_parallel=False, tensor_group=groups().tensor)
    model = TwoNumbers(head)
    return Pipeline(model, head, data_parallel_size=data_parallel_size, progress=progress), model


def weighted(output: Tensor, number: int) -> LossOutput:
    """(1 + number of the micro-batch) * sum of its first numbers."""
    loss = (1 + number) * output[:, 0].sum()
    return LossOutput(loss=loss, metrics={"rows": Mean(float(len(output)), 1.0)})


def test_what_is_collected_of_each_micro_batch_comes_in_their_order() -> None:
    run, _ = pipeline()
    found = run.forward(MICROBATCHES, lambda output, microbatch: (output.tolist(), microbatch))
    assert [rows for rows, _ in found] == [[[4, 1], [5, 2]], [], [[8, 0], [7, 1]]]
    assert all(seen is given for (_, seen), given in zip(found, MICROBATCHES, strict=True))


def test_all_rows_can_be_asked_for() -> None:
    run, _ = pipeline()
    found = run.forward(MICROBATCHES[:1], lambda output, _: output.tolist(), all_rows=True)
    assert found == [[[3, 0], [4, 1], [5, 2]]]
    padded = run.forward(MICROBATCHES[2:], lambda output, _: output[:, 0].tolist(), all_rows=True)
    assert padded == [[6, 8, 7, 9]]  # of a flattened [S, B]


@pytest.mark.parametrize("training", [True, False])
def test_scoring_leaves_no_gradient_and_the_model_as_it_was(training: bool) -> None:
    run, model = pipeline()
    model.train(training)
    (found,) = run.forward(MICROBATCHES[:1], lambda output, _: output)
    assert model.modes == [(False, False)]
    assert model.training is training and not found.requires_grad and model.weight.grad is None


def test_losses_come_in_the_order_of_their_micro_batches_and_carry_no_graph() -> None:
    run, model = pipeline()
    outputs = run.forward_backward(MICROBATCHES, weighted)
    assert [float(output.loss) for output in outputs] == [9.0, 0.0, 45.0]
    assert [output.metrics["rows"] for output in outputs] == [Mean(2.0, 1.0), Mean(0.0, 1.0), Mean(2.0, 1.0)]
    assert not any(output.loss.requires_grad for output in outputs)
    assert model.modes == [(True, True)] * 3


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_gradient_is_that_of_the_sum_of_the_losses_however_they_are_cut(number: int) -> None:
    run, model = pipeline()
    run.forward_backward(MICROBATCHES[:number], weighted)
    assert model.weight.grad is not None
    assert float(model.weight.grad) == pytest.approx((9, 9, 54)[number - 1])


def test_replicas_are_averaged_later_and_their_sum_is_wanted() -> None:
    run, model = pipeline(data_parallel_size=4)
    outputs = run.forward_backward(MICROBATCHES, weighted)
    assert [float(output.loss) for output in outputs] == [9.0, 0.0, 45.0]
    assert model.weight.grad is not None and float(model.weight.grad) == pytest.approx(4 * 54)


@pytest.mark.parametrize("data_parallel_size", [1, 4])
def test_what_arrives_at_each_loss_is_what_kernels_are_told_will_arrive(data_parallel_size: int) -> None:
    run, _ = pipeline(data_parallel_size=data_parallel_size)
    arrived: list[float] = []

    def loss(output: Tensor, number: int) -> LossOutput:
        found = weighted(output, number)
        found.loss.register_hook(lambda gradient: arrived.append(float(gradient)))
        return found

    run.forward_backward(MICROBATCHES, loss)
    assert arrived == pytest.approx([run.upstream] * 3)


def test_every_micro_batch_is_progress() -> None:
    progress = Progress()
    run, _ = pipeline(progress=progress)
    run.forward(MICROBATCHES, lambda *_: None)
    assert progress.pieces == 3
    run.forward_backward(MICROBATCHES[:2], weighted)
    assert progress.pieces == 5


def test_a_scoring_in_between_leaves_the_next_update_its_own_rows() -> None:
    run, model = pipeline()
    run.forward(MICROBATCHES, lambda *_: None, all_rows=True)
    run.forward_backward(MICROBATCHES[:1], weighted)
    assert float(cast(Tensor, model.weight.grad)) == 9.0
