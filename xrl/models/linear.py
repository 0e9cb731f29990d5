"""megatron-core's parallel linear layers with our own matrix product, for the CPU.

Same parameters, same communication; only the product differs. On CUDA megatron-core's own layers overlap the product
with communication and are used as they are.
"""

from __future__ import annotations

from megatron.core import tensor_parallel
from torch import Tensor

from xrl.kernels.layers.linear import linear


class ColumnParallelLinear(tensor_parallel.ColumnParallelLinear):
    """The weight is cut along its outputs; every rank needs the whole input."""

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        *,
        bias: Tensor | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        **_: object,
    ) -> Tensor:
        # megatron-core has spread the input already where neither is asked for.
        out = linear(self.spread(input) if sequence_parallel or allreduce_dgrad else input, weight)
        return out if bias is None else out + bias

    def spread(self, x: Tensor) -> Tensor:
        """The whole input for this rank's product; in the backward pass the ranks' gradients are added up."""
        if self.tp_group.size() == 1:
            return x
        if self.sequence_parallel:
            return tensor_parallel.gather_from_sequence_parallel_region(x, group=self.tp_group)
        return tensor_parallel.copy_to_tensor_model_parallel_region(x, group=self.tp_group)


class RowParallelLinear(tensor_parallel.RowParallelLinear):
    """The weight is cut along its inputs; megatron-core adds up what the ranks computed."""

    def _forward_impl(self, input: Tensor, weight: Tensor, **_: object) -> Tensor:
        return linear(input, weight)

    def combine(self, x: Tensor) -> Tensor:
        """The sum of the ranks' products; each rank gets its tokens of it under sequence parallelism."""
        if self.tp_group.size() == 1:
            return x
        if self.sequence_parallel:
            return tensor_parallel.reduce_scatter_to_sequence_parallel_region(x, group=self.tp_group)
        return tensor_parallel.reduce_from_tensor_model_parallel_region(x, group=self.tp_group)
