"""megatron-core's parallel linear layers with our own matrix product, for the CPU.

Same parameters, same communication; only the product differs. On CUDA megatron-core's own layers overlap the product
with communication and are used as they are.
"""

from __future__ import annotations

from megatron.core import tensor_parallel
from torch import Tensor
from torch.distributed import ProcessGroup

from xrl.kernels.linear import linear


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
        tp_group: ProcessGroup | None,
        **_: object,
    ) -> Tensor:
        if sequence_parallel:
            input = tensor_parallel.gather_from_sequence_parallel_region(input, group=tp_group)
        elif allreduce_dgrad:
            input = tensor_parallel.copy_to_tensor_model_parallel_region(input, group=tp_group)
        out = linear(input, weight)
        return out if bias is None else out + bias


class RowParallelLinear(tensor_parallel.RowParallelLinear):
    """The weight is cut along its inputs; megatron-core adds up what the ranks computed."""

    def _forward_impl(self, input: Tensor, weight: Tensor, **_: object) -> Tensor:
        return linear(input, weight)
