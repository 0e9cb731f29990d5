"""Which rank holds which part of the model: pure arithmetic, no processes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A tensor x pipeline x data parallel grid in Megatron's rank order (tensor fastest, pipeline slowest)."""

    tensor_size: int
    pipeline_size: int
    data_size: int

    @classmethod
    def of_world(cls, world_size: int, *, tensor_size: int, pipeline_size: int) -> Layout:
        """The layout of `world_size` ranks; whatever tensor and pipeline leave is data parallel.

        Raises:
            ValueError: tensor x pipeline does not divide the world size.
        """
        model_size = tensor_size * pipeline_size
        if world_size % model_size:
            raise ValueError(
                f"world size {world_size} is not divisible by {tensor_size} x {pipeline_size} = {model_size}"
            )
        return cls(tensor_size=tensor_size, pipeline_size=pipeline_size, data_size=world_size // model_size)

    @property
    def world_size(self) -> int:
        return self.tensor_size * self.pipeline_size * self.data_size

    def rank(self, *, tensor: int, pipeline: int, data: int) -> int:
        """The global rank at a place of the grid."""
        return tensor + self.tensor_size * (data + self.data_size * pipeline)

    def layers(self, pipeline_rank: int, num_layers: int) -> range:
        """The decoder layers of a pipeline stage.

        Raises:
            ValueError: the layers do not spread evenly over the stages.
        """
        if num_layers % self.pipeline_size:
            raise ValueError(f"{num_layers} layers do not spread evenly over {self.pipeline_size} pipeline stages")
        share = num_layers // self.pipeline_size
        return range(share * pipeline_rank, share * (pipeline_rank + 1))

    def __str__(self) -> str:
        return f"TP{self.tensor_size} x PP{self.pipeline_size} x DP{self.data_size}"
