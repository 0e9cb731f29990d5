"""How the model is spread over ranks. Names are Megatron's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from xrl.config.errors import SettingsError
from xrl.config.numbers import LONGEST_S, check_at_most


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Tensor x pipeline x data parallel layout; data parallel = ranks / (tensor x pipeline)."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's matrices."""

    pipeline_model_parallel_size: int = 1
    """Ranks that each hold a run of consecutive layers."""

    expert_model_parallel_size: int = 1
    """Data-parallel ranks that each hold a part of the experts (mixture-of-experts models)."""

    decoder_first_pipeline_num_layers: int | None = None
    """Layers of the first pipeline stage; default: stages are as even as the layers allow."""

    decoder_last_pipeline_num_layers: int | None = None
    """Layers of the last pipeline stage; default: stages are as even as the layers allow."""

    context_parallel_size: int = 1
    """Ranks that share each sequence (only 1 so far)."""

    sequence_parallel: bool = False
    """Split norms and residuals along the sequence over the tensor-parallel ranks."""

    use_distributed_optimizer: bool = False
    """Shard optimizer state over the data-parallel ranks."""

    distributed_backend: Literal["auto", "nccl", "gloo"] = "auto"
    """torch.distributed backend; auto: nccl on CUDA, gloo on CPU."""

    distributed_timeout_minutes: float = 10.0
    """A collective that waits longer than this ends the run."""

    def __post_init__(self) -> None:
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "expert_model_parallel_size",
            "decoder_first_pipeline_num_layers",
            "decoder_last_pipeline_num_layers",
            "context_parallel_size",
        ):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise SettingsError(f"--{name.replace('_', '-')} must be >= 1, got {size}")
        if self.context_parallel_size > 1:
            raise SettingsError(
                f"--context-parallel-size must be 1 (context parallelism is not supported yet), "
                f"got {self.context_parallel_size}"
            )
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise SettingsError("--sequence-parallel needs --tensor-model-parallel-size > 1, got 1")
        if self.distributed_backend not in ("auto", "nccl", "gloo"):
            raise SettingsError(f"--distributed-backend must be auto, nccl or gloo, got {self.distributed_backend!r}")
        check_at_most("--distributed-timeout-minutes", self.distributed_timeout_minutes, LONGEST_S // 60)
        if self.distributed_timeout_minutes <= 0:
            raise SettingsError(f"--distributed-timeout-minutes must be > 0, got {self.distributed_timeout_minutes:g}")
