"""Runs micro-batches through megatron-core's pipeline schedules: forward only, or forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from xrl.actor.microbatch import Microbatch
from xrl.launch.progress import Progress
from xrl.models.head import ResponseRows
from xrl.types import LossOutput

T = TypeVar("T")
Model = torch.nn.Module


class Pipeline:
    """Runs one model (this rank's stage) over micro-batches, whatever the number of stages."""

    def __init__(
        self, model: Model, head: ResponseRows, *, data_parallel_size: int, progress: Progress | None = None
    ) -> None:
        """
        Args:
            progress: advances with every micro-batch.
        """
        self.model = model
        self.progress = progress or Progress()
        self.head = head
        self.data_parallel_size = data_parallel_size
        # What the backward pass brings to each micro-batch's loss: replicas are averaged, and their sum is wanted.
        self.upstream = float(data_parallel_size)
        # Schedules differ with and without stages; megatron-core picks one.
        self.run = get_forward_backward_func()

    @torch.no_grad()
    def forward(
        self, microbatches: Sequence[Microbatch], collect: Callable[[Tensor, Microbatch], T], *, all_rows: bool = False
    ) -> list[T]:
        """Run the forward pass; returns `collect` of each micro-batch's head output on the last stage, else [].

        The output is the logits [R, V / tp], or hidden states [S * B, h] where the head hands them on.

        Args:
            all_rows: logits of every token, [S * B, V / tp], not only those that predict a response token.
        """

        def step(iterator: Iterator[Microbatch], model: Model, *_: Any) -> tuple[Tensor, Callable[..., T]]:
            microbatch = next(iterator)
            output = self._forward(model, microbatch, all_rows=all_rows)
            return output, lambda output, non_loss_data=True: collect(_rows(output), microbatch)

        was_training = self.model.training
        self.model.eval()
        collected = self.run(
            forward_step_func=step,
            data_iterator=iter(microbatches),
            model=self.model,
            num_microbatches=len(microbatches),
            seq_length=1,  # unused: lengths vary and are exchanged
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
        self.model.train(was_training)
        return list(collected)

    def forward_backward(
        self, microbatches: Sequence[Microbatch], loss: Callable[[Tensor, int], LossOutput]
    ) -> list[LossOutput]:
        """Accumulate the gradient of the summed losses; returns the losses on the last stage, nothing on the others.

        Args:
            loss: (the head's output as in `forward`, number of the micro-batch) -> its share of the loss.
        """
        # megatron-core averages over micro-batches and replicas; our losses are shares of one sum already.
        scale = len(microbatches) * self.data_parallel_size

        def finish(number: int, head_output: Tensor) -> tuple[Tensor, LossOutput]:
            output = loss(_rows(head_output), number)
            return output.loss * scale, LossOutput(loss=output.loss.detach(), metrics=output.metrics)

        def step(
            iterator: Iterator[tuple[int, Microbatch]], model: Model, *_: Any
        ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, LossOutput]]]:
            number, microbatch = next(iterator)
            return self._forward(model, microbatch), partial(finish, number)

        outputs = self.run(
            forward_step_func=step,
            data_iterator=iter(enumerate(microbatches)),
            model=self.model,
            num_microbatches=len(microbatches),
            seq_length=1,
            micro_batch_size=1,
            forward_only=False,
        )
        return list(outputs)

    def _forward(self, model: Model, microbatch: Microbatch, *, all_rows: bool = False) -> Tensor:
        self.progress.advance()
        self.head.rows = None if all_rows else microbatch.rows
        output: Tensor = model(
            input_ids=microbatch.input_ids,
            position_ids=microbatch.position_ids,
            attention_mask=None,
            packed_seq_params=microbatch.attention,
        )
        return output


def _rows(output: Tensor) -> Tensor:
    """[1, R, *] or [B, S, *] -> [R, *], in the order of the flattened [S, B]."""
    return output.transpose(0, 1).flatten(0, 1)
