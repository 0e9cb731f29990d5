"""Which slice of which Hugging Face tensor goes where in which rank's parameters: arithmetic, no processes, no torch.

    plan(shape, layout).parameters(place) -> ParameterPlan(names, shape, slices) ...

The model falls into parts, in the order they travel: "embeddings", "layers.0", ..., "final". One plan drives loading
(read each slice, put it into its parameter), export (put it back into whole tensors) and resharding (`reshard.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from xrl.config import SettingsError
from xrl.models.shape import ModelShape
from xrl.parallel.layout import Layout, Place
from xrl.weights.families import TABLES
from xrl.weights.mapping import Cut, WeightMapping, WeightTable, sizes

EMBEDDINGS, FINAL = "embeddings", "final"
LAYERS = "decoder.layers."

TensorShape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """Rows of a Hugging Face tensor that a parameter holds. A row is an index along `dim`; other dimensions are whole.

    The rows are `count` blocks of `block` rows. In the tensor they follow each other from `source` on; in the parameter
    the first lies at `target`, each next one `stride` rows further: with heads interleaved, the rows of other tensors
    are in between.
    """

    tensor: str
    dim: int
    source: int
    target: int
    block: int
    count: int = 1
    stride: int = 0

    @property
    def source_stop(self) -> int:
        """One past the last row in the tensor."""
        return self.source + self.block * self.count


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterPlan:
    """One parameter of one rank. What its slices leave out (padding of the vocabulary) is zero."""

    part: str
    names: tuple[str, ...]  # in the rank's GPTModel, which has it under one of these
    virtual_stage: int  # which of the rank's models, where it has several
    tensors: tuple[str, ...]  # Hugging Face tensors it is made of, also where its rank has padding only
    shape: TensorShape  # of this rank's part
    slices: tuple[Slice, ...]
    is_expert: bool  # an expert's: other expert ranks have another under the same name
    is_exported: bool  # False where another parameter or rank holds the same and exports it
    keeps_dtype: bool  # stays in its own number format on export


def plan(shape: ModelShape, layout: Layout, *, transformer_engine: bool = False) -> Plan:
    """The plan of a model over a layout.

    Args:
        transformer_engine: layers are transformer-engine's, which hold DeepSeek's narrow projections uncut.

    Raises:
        SettingsError: no table for the architecture, or the layout does not divide the model; says what would work.
    """
    table = TABLES.get(shape.architecture)
    if table is None:
        raise SettingsError(f"no mapping table for {shape.architecture}, known are: {', '.join(TABLES)}")
    _check_divides(shape, layout, table, transformer_engine)
    return Plan(shape, layout, table, transformer_engine=transformer_engine)


def is_recomputed(name: str) -> bool:
    """Whether a tensor of old checkpoints stores what config.json gives: rotary frequencies."""
    return name.endswith(".rotary_emb.inv_freq")


def part_names(shape: ModelShape) -> list[str]:
    """The parts of a model, in the order they travel."""
    return [EMBEDDINGS, *(f"layers.{layer}" for layer in range(shape.num_layers)), FINAL]


def tensor_shapes(shape: ModelShape, part: str) -> dict[str, TensorShape]:
    """The Hugging Face tensors of a part of the model."""
    table = TABLES[shape.architecture]
    words = sizes(shape)
    prefix = _prefix(table, part)
    shapes = {}
    for mapping in _mappings(table, shape, part):
        if mapping.is_copy:
            continue
        for name, dims in mapping.tensors.items():
            for expert in _experts_of(mapping, range(shape.experts.num_experts) if shape.experts else range(0)):
                shapes[prefix + name.format(expert=expert)] = tuple(words[word] for word in dims)
    return shapes


def num_parameters(shape: ModelShape) -> int:
    """Parameters of the whole model."""
    return sum(math.prod(size) for part in part_names(shape) for size in tensor_shapes(shape, part).values())


class Plan:
    """The parameters of every rank; made by `plan`."""

    def __init__(self, shape: ModelShape, layout: Layout, table: WeightTable, *, transformer_engine: bool) -> None:
        self.shape = shape
        self.layout = layout
        self.transformer_engine = transformer_engine
        self.parts = part_names(shape)
        self._table = table
        self._words = sizes(shape)
        self._chunks = layout.chunks(shape.num_layers)
        self._tensors: dict[str, dict[str, TensorShape]] = {}
        self._part_of: dict[str, str] = {}
        self._sources: dict[str, dict[str, list[tuple[Place, ParameterPlan, Slice]]]] = {}
        self._parameters: dict[tuple[str, int, int], tuple[ParameterPlan, ...]] = {}

    def tensors(self, part: str) -> Mapping[str, TensorShape]:
        """The whole Hugging Face tensors of a part."""
        if part not in self._tensors:
            self._tensors[part] = tensor_shapes(self.shape, part)
        return self._tensors[part]

    def keeping_dtype(self, part: str) -> frozenset[str]:
        """The tensors of a part that stay fp32, whatever number format the others are exported in."""
        mappings = [mapping for mapping in _mappings(self._table, self.shape, part) if mapping.keeps_dtype]
        prefix = _prefix(self._table, part)
        return frozenset(prefix + name for mapping in mappings for name in mapping.tensors)

    def stage(self, part: str) -> int:
        """The pipeline rank that holds a part."""
        return self._chunk(part) % self.layout.pipeline_size

    def parameters(self, place: Place) -> Iterator[ParameterPlan]:
        """Everything a rank holds, in the order of the parts; any rank with the same tensor, expert and pipeline place
        holds the same."""
        for part in self.parts:
            if self.stage(part) == place.pipeline:
                yield from self.part_parameters(part, place)

    def part_parameters(self, part: str, place: Place) -> tuple[ParameterPlan, ...]:
        """A rank's share of one part; empty on other pipeline stages."""
        if self.stage(part) != place.pipeline:
            return ()
        key = part, place.tensor, place.expert
        if key not in self._parameters:
            self._parameters[key] = tuple(self._make(part, place))
        return self._parameters[key]

    def holders(self, part: str) -> Iterator[Place]:
        """The places of the ranks that together hold a part: of several ranks that hold the same, the first."""
        for expert in range(self.layout.expert_size if self._table.sparse else 1):
            data, context = divmod(expert, self.layout.context_size)
            for tensor in range(self.layout.tensor_size):
                yield Place(tensor=tensor, expert=expert, data=data, context=context, pipeline=self.stage(part))

    def part_of(self, tensor: str) -> str:
        """The part that a Hugging Face tensor belongs to."""
        if not self._part_of:
            self._part_of = {name: part for part in self.parts for name in self.tensors(part)}
        return self._part_of[tensor]

    def sources(self, tensor: str) -> list[tuple[Place, ParameterPlan, Slice]]:
        """Where the rows of a Hugging Face tensor lie: slices of parameters, each row once."""
        part = self.part_of(tensor)
        if part not in self._sources:
            found: dict[str, list[tuple[Place, ParameterPlan, Slice]]] = {name: [] for name in self.tensors(part)}
            for place in self.holders(part):
                for parameter in self.part_parameters(part, place):
                    for piece in parameter.slices if parameter.is_exported else ():
                        found[piece.tensor].append((place, parameter, piece))
            self._sources[part] = found
        return self._sources[part][tensor]

    def _chunk(self, part: str) -> int:
        if part == EMBEDDINGS:
            return 0
        if part == FINAL:
            return len(self._chunks) - 1
        layer = _layer_of(part)
        return next(number for number, chunk in enumerate(self._chunks) if layer in chunk)

    def _make(self, part: str, place: Place) -> Iterator[ParameterPlan]:
        chunk = self._chunk(part)
        source_prefix, target_prefix = _prefix(self._table, part), ""
        if part.startswith("layers."):
            target_prefix = f"{LAYERS}{_layer_of(part) - self._chunks[chunk].start}."
        for mapping in _mappings(self._table, self.shape, part):
            if mapping.is_copy and len(self._chunks) == 1:
                continue  # the embedding itself serves as head
            per_expert = _experts_of(mapping, self._experts(place.expert))
            for local, expert in enumerate(per_expert):
                shape, slices = self._cut(mapping, place.tensor, source_prefix, expert)
                names = [mapping.megatron] if mapping.te_name is None else [mapping.megatron, mapping.te_name]
                cut = mapping.cut_in(transformer_engine=self.transformer_engine)
                is_first = place.tensor == 0 or cut is not Cut.WHOLE
                is_first &= place.expert == 0 or expert is not None
                yield ParameterPlan(
                    part=part,
                    names=tuple(target_prefix + name.format(expert=local) for name in names),
                    virtual_stage=chunk // self.layout.pipeline_size,
                    tensors=tuple(source_prefix + name.format(expert=expert) for name in mapping.tensors),
                    shape=shape,
                    slices=slices,
                    is_expert=expert is not None,
                    is_exported=is_first and not mapping.is_copy,
                    keeps_dtype=mapping.keeps_dtype,
                )

    def _experts(self, expert_rank: int) -> range:
        """The experts of one expert-parallel rank."""
        if self.shape.experts is None:
            return range(0)
        share = self.shape.experts.num_experts // self.layout.expert_size
        return range(share * expert_rank, share * (expert_rank + 1))

    def _cut(
        self, mapping: WeightMapping, rank: int, prefix: str, expert: int | None
    ) -> tuple[TensorShape, tuple[Slice, ...]]:
        """Shape and slices of the parameter on one tensor rank."""
        cut, size = mapping.cut_in(transformer_engine=self.transformer_engine), self.layout.tensor_size
        names = [prefix + name.format(expert=expert) for name in mapping.tensors]
        shapes = [tuple(self._words[word] for word in dims) for dims in mapping.tensors.values()]
        dim = 1 if cut is Cut.INPUTS else 0
        lengths = [shape[dim] for shape in shapes]
        if cut is Cut.WHOLE:
            slices = [Slice(tensor=names[0], dim=0, source=0, target=0, block=lengths[0])]
            return shapes[0], tuple(slices)
        if cut is Cut.VOCABULARY:
            share = self.layout.padded_vocab_size(lengths[0]) // size
            start = min(rank * share, lengths[0])
            rows = min(share, lengths[0] - start)
            slices = [Slice(tensor=names[0], dim=0, source=start, target=0, block=rows)] if rows else []
            return (share, *shapes[0][1:]), tuple(slices)
        groups = self.shape.num_kv_heads // size if cut is Cut.HEADS else 1
        blocks = [length // size // groups for length in lengths]
        stride = sum(blocks)
        starts = [sum(blocks[:index]) for index in range(len(blocks))]
        slices = [
            Slice(
                tensor=name,
                dim=dim,
                source=rank * groups * block,
                target=start,
                block=block,
                count=groups,
                stride=stride,
            )
            for name, block, start in zip(names, blocks, starts, strict=True)
        ]
        whole = list(shapes[0])
        whole[dim] = stride * groups
        return tuple(whole), tuple(slices)


def _prefix(table: WeightTable, part: str) -> str:
    """Of the Hugging Face names in a part."""
    return table.layer_prefix.format(layer=_layer_of(part)) if part.startswith("layers.") else ""


def _layer_of(part: str) -> int:
    return int(part.removeprefix("layers."))


def _mappings(table: WeightTable, shape: ModelShape, part: str) -> list[WeightMapping]:
    if part == EMBEDDINGS:
        return table.embedding_mappings(shape)
    if part == FINAL:
        return table.final_mappings(shape)
    return table.layer_mappings(shape, _layer_of(part))


def _experts_of(mapping: WeightMapping, experts: range) -> list[int | None]:
    """The experts that a mapping stands for; [None] where it stands for itself."""
    return list(experts) if "{expert}" in mapping.megatron else [None]


def _check_divides(shape: ModelShape, layout: Layout, table: WeightTable, transformer_engine: bool) -> None:
    """Refuse a layout that cuts a head, or leaves ranks unequal."""
    size = layout.tensor_size
    words = sizes(shape)
    lengths: dict[str, int] = {}
    for part in part_names(shape):
        for mapping in _mappings(table, shape, part):
            cut = mapping.cut_in(transformer_engine=transformer_engine)
            if cut is Cut.HEADS:
                lengths["key/value heads"] = shape.num_kv_heads
            elif cut in (Cut.OUTPUTS, Cut.INPUTS):
                dim = 1 if cut is Cut.INPUTS else 0
                lengths |= {name: words[dims[dim]] for name, dims in mapping.tensors.items()}
    if shape.latent is not None:
        lengths["attention heads"] = shape.num_heads
    for what, length in lengths.items():
        if length % size:
            fitting = math.gcd(*lengths.values())
            works = ", ".join(str(number) for number in range(1, fitting + 1) if fitting % number == 0)
            where = f"the model's {length} {what}" if "heads" in what else f"the {length} rows or columns of {what}"
            raise SettingsError(f"tensor-parallel size {size} does not divide {where}: these sizes would work: {works}")
    num_experts = shape.experts.num_experts if shape.experts is not None else 0
    if layout.expert_size > 1 and not num_experts:
        raise SettingsError(f"expert-parallel size {layout.expert_size} needs a model with experts, this one has none")
    if num_experts and num_experts % layout.expert_size:
        raise SettingsError(
            f"expert-parallel size {layout.expert_size} does not divide the model's {num_experts} experts"
        )
    try:
        layout.chunks(shape.num_layers)
    except ValueError as error:
        raise SettingsError(str(error)) from error
