"""Which rank holds which part of the model: pure arithmetic, no processes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a rank stands in the grid."""

    tensor: int = 0
    context: int = 0
    data: int = 0
    pipeline: int = 0
    expert: int = 0  # its share of the experts; follows from context and data


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A tensor x context x data x pipeline parallel grid in Megatron's rank order: tensor fastest, pipeline slowest.

    Experts are spread over the ranks that context and data parallelism make, so `expert_size` ranks of those hold
    different experts and the same of everything else. With a virtual pipeline, each stage holds several runs of layers
    (chunks), so that a token passes every stage several times.

    Raises:
        ValueError: a size below 1, or sizes that do not fit each other.
    """

    tensor_size: int
    pipeline_size: int
    data_size: int = 1
    virtual_pipeline_size: int = 1
    expert_size: int = 1
    context_size: int = 1
    first_stage_layers: int | None = None  # of the first stage, all its chunks together; None: as `layers` says
    last_stage_layers: int | None = None  # of the last stage

    def __post_init__(self) -> None:
        for name in (
            "tensor_size",
            "pipeline_size",
            "data_size",
            "virtual_pipeline_size",
            "expert_size",
            "context_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.context_size * self.data_size % self.expert_size:
            raise ValueError(
                f"expert_size {self.expert_size} does not divide the {self.context_size} x {self.data_size} ranks of "
                f"context and data parallelism that experts are spread over"
            )
        if self.virtual_pipeline_size > 1 and self.pipeline_size == 1:
            raise ValueError(f"virtual_pipeline_size {self.virtual_pipeline_size} needs pipeline_size > 1, got 1")
        for name in ("first_stage_layers", "last_stage_layers"):
            given = getattr(self, name)
            if given is not None and (given < 1 or self.pipeline_size == 1):
                raise ValueError(
                    f"{name} must be >= 1 and needs pipeline_size > 1, got {given} with pipeline_size "
                    f"{self.pipeline_size}"
                )

    @classmethod
    def of_world(
        cls,
        world_size: int,
        *,
        tensor_size: int,
        pipeline_size: int,
        context_size: int = 1,
        expert_size: int = 1,
        virtual_pipeline_size: int = 1,
        first_stage_layers: int | None = None,
        last_stage_layers: int | None = None,
    ) -> Layout:
        """The layout of `world_size` ranks; whatever tensor, context and pipeline leave is data parallel.

        Raises:
            ValueError: tensor x context x pipeline does not divide the world size, or the experts do not fit.
        """
        factors = [size for size in (tensor_size, context_size, pipeline_size) if size > 1] or [1]
        model_size = max(1, tensor_size * context_size * pipeline_size)
        if world_size % model_size:
            raise ValueError(
                f"world size {world_size} is not divisible by {' x '.join(map(str, factors))} = {model_size}"
            )
        return cls(
            tensor_size=tensor_size,
            pipeline_size=pipeline_size,
            data_size=world_size // model_size,
            context_size=context_size,
            expert_size=expert_size,
            virtual_pipeline_size=virtual_pipeline_size,
            first_stage_layers=first_stage_layers,
            last_stage_layers=last_stage_layers,
        )

    @property
    def world_size(self) -> int:
        return self.tensor_size * self.context_size * self.data_size * self.pipeline_size

    def rank(self, *, tensor: int, pipeline: int, data: int, context: int = 0) -> int:
        """The global rank at a place of the grid."""
        return tensor + self.tensor_size * (context + self.context_size * (data + self.data_size * pipeline))

    def place(self, rank: int) -> Place:
        """Where a global rank stands."""
        rest, tensor = divmod(rank, self.tensor_size)
        pipeline, replica = divmod(rest, self.context_size * self.data_size)
        data, context = divmod(replica, self.context_size)
        return Place(tensor=tensor, context=context, data=data, pipeline=pipeline, expert=replica % self.expert_size)

    def chunks(self, num_layers: int) -> list[range]:
        """The decoder layers of every chunk, in the order a token passes them: chunk v of stage p is number
        v * pipeline_size + p.

        Layers that are left over go, one each, to the chunks in the middle from the front on, then to the first one,
        which also holds the embedding; never to the last, which also computes the logits. Where the size of the first
        or the last stage is given, the others must share the rest evenly, as in Megatron.

        Raises:
            ValueError: fewer layers than chunks, or given sizes that leave the others uneven.
        """
        sizes = self._chunk_sizes(num_layers)
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]

    def layers(self, pipeline_rank: int, num_layers: int, virtual_stage: int = 0) -> range:
        """The decoder layers of one chunk of a pipeline stage, as `chunks` gives them."""
        return self.chunks(num_layers)[virtual_stage * self.pipeline_size + pipeline_rank]

    def is_even(self, num_layers: int) -> bool:
        """Whether every chunk holds equally many layers, so that megatron-core needs no `pipeline_layout`."""
        return len({len(chunk) for chunk in self.chunks(num_layers)}) == 1

    def pipeline_layout(self, num_layers: int) -> list[list[str]]:
        """The chunks as megatron-core's `pipeline_model_parallel_layout`."""
        chunks = [["decoder"] * len(chunk) for chunk in self.chunks(num_layers)]
        chunks[0].insert(0, "embedding")
        chunks[-1].append("loss")
        return chunks

    def padded_vocab_size(self, vocab_size: int) -> int:
        """The vocabulary rounded up so that every tensor rank holds equally many rows."""
        return -(-vocab_size // self.tensor_size) * self.tensor_size

    def _chunk_sizes(self, num_layers: int) -> list[int]:
        if self.first_stage_layers is not None or self.last_stage_layers is not None:
            return self._given_sizes(num_layers)
        num_chunks = self.pipeline_size * self.virtual_pipeline_size
        size, left_over = divmod(num_layers, num_chunks)
        if size == 0:
            raise ValueError(f"{num_layers} layers are too few for {num_chunks} pipeline chunks of at least one each")
        fuller = [*range(1, num_chunks - 1), 0][:left_over]
        return [size + (chunk in fuller) for chunk in range(num_chunks)]

    def _given_sizes(self, num_layers: int) -> list[int]:
        """Megatron's --decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers."""
        first, last = self.first_stage_layers, self.last_stage_layers
        stages: list[int | None] = [None] * self.pipeline_size
        if first is not None:
            stages[0] = first
        if last is not None:
            stages[-1] = last
        rest = num_layers - (first or 0) - (last or 0)
        others = stages.count(None)
        given = " and ".join(f"{size} in the {which}" for which, size in (("first", first), ("last", last)) if size)
        if rest < others or (rest % others if others else rest):
            raise ValueError(
                f"{num_layers} layers with {given} pipeline stage leave {rest}, which {others} other stages cannot "
                f"share evenly"
            )
        sizes = [rest // others if size is None else size for size in stages]
        for size in sizes:
            if size % self.virtual_pipeline_size:
                raise ValueError(
                    f"a pipeline stage of {size} layers cannot be cut into {self.virtual_pipeline_size} equal chunks"
                )
        return [size // self.virtual_pipeline_size for size in sizes] * self.virtual_pipeline_size

    def __str__(self) -> str:
        return f"TP{self.tensor_size} x PP{self.pipeline_size} x DP{self.data_size}" + "".join(
            f" x {name}{size}"
            for name, size in (
                ("VPP", self.virtual_pipeline_size),
                ("EP", self.expert_size),
                ("CP", self.context_size),
            )
            if size > 1
        )
