"""The output head computes logits only where a response token is predicted."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from torch import Tensor
from torch.distributed import ProcessGroup


class ResponseRows:
    """A pre-hook of the output layer: keeps the hidden states that predict response tokens.

    Prompts, padding and last tokens have no loss, so their logits, [vocabulary] floats each, are never made.
    """

    def __init__(self, *, sequence_parallel: bool, tensor_group: ProcessGroup) -> None:
        self.sequence_parallel = sequence_parallel
        self.tensor_group = tensor_group
        self.rows: Tensor | None = None  # [R] into the flattened [S, B]; None keeps all

    def attach(self, output_layer: torch.nn.Module) -> None:
        if self.sequence_parallel:
            # Rows are picked from the gathered sequence below, so the layer must not gather again.
            output_layer.sequence_parallel = False  # type: ignore[assignment]
            output_layer.allreduce_dgrad = True  # type: ignore[assignment]
        output_layer.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden: Tensor = args[0]  # [S, B, h]; [S / tp, B, h] under sequence parallelism
        if self.sequence_parallel:
            # The layer's own backward sums the gradient over the tensor ranks; this one only takes its part.
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.tensor_group
            )
        if self.rows is not None:
            hidden = hidden.flatten(0, 1).index_select(0, self.rows).unsqueeze(1)  # [R, 1, h]
        return (hidden, *args[1:]), kwargs
