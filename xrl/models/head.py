"""The output head computes logits only where a response token is predicted, or hands the hidden states on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from torch import Tensor
from torch.distributed import ProcessGroup


class ResponseRows:
    """Changes an output layer: it computes only the rows that predict response tokens.

    Prompts, padding and last tokens have no loss, so their logits, [vocabulary] floats each, are never made. With
    `returns_hidden` no logits are made at all: the layer gives the hidden states as they came, and who computes the
    loss picks the rows and multiplies by `weight`.
    """

    def __init__(self, *, sequence_parallel: bool, tensor_group: ProcessGroup, returns_hidden: bool = False) -> None:
        self.sequence_parallel = sequence_parallel
        self.tensor_group = tensor_group
        self.returns_hidden = returns_hidden
        self.rows: Tensor | None = None  # [R] into the flattened [S, B]; None asks for the logits of all
        self.weight: Tensor | None = None  # of the layer, or the embedding's it is tied to; known after a forward pass

    def attach(self, output_layer: torch.nn.Module) -> None:
        if self.sequence_parallel:
            # Rows are picked from the gathered sequence below, so the layer must not gather again.
            output_layer.sequence_parallel = False  # type: ignore[assignment]
            output_layer.allreduce_dgrad = True  # type: ignore[assignment]
        # An attribute of the instance goes before the class's method; parameters keep their names.
        output_layer.forward = partial(self._forward, output_layer, output_layer.forward)

    def _forward(
        self,
        layer: torch.nn.Module,
        compute: Callable[..., Any],
        hidden: Tensor,
        weight: Tensor | None = None,
        **rest: Any,
    ) -> Any:
        """hidden [S, B, h], or [S / tp, B, h] under sequence parallelism."""
        if self.returns_hidden and self.rows is not None:
            self.weight = layer.weight if weight is None else weight  # type: ignore[assignment]
            return hidden, None
        if self.sequence_parallel:
            # The layer's own backward sums the gradient over the tensor ranks; this one only takes its part.
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.tensor_group
            )
        if self.rows is not None:
            hidden = hidden.flatten(0, 1).index_select(0, self.rows).unsqueeze(1)  # [R, 1, h]
        return compute(hidden, weight=weight, **rest)
