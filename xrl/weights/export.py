"""Stream the whole model out of its ranks, one decoder layer at a time, as Hugging Face tensors on rank 0."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from xrl.models.build import padded_vocab_size
from xrl.models.shape import ModelShape
from xrl.parallel.groups import ParallelGroups
from xrl.types import WeightBucket
from xrl.weights import mapping
from xrl.weights.qwen import layer_table, outer_table


@torch.no_grad()
def export_weights(
    parameters: Mapping[str, Tensor], shape: ModelShape, groups: ParallelGroups, *, version: int
) -> Iterator[WeightBucket]:
    """Yield embeddings, then each decoder layer, then final norm and head: on rank 0 only.

    Collective: every rank must run the generator to its end. Tensor ranks gather to the first of their stage, which
    sends to rank 0; the first data-parallel replica does the work, the others return at once. Rank 0 holds one bucket
    at a time.

    Args:
        parameters: this rank's, by their names in the GPTModel: weights, or gradients, which have the same form.
    """
    if groups.data_rank != 0:
        return
    exporter = _Exporter(parameters, shape, groups)
    last_stage = groups.layout.pipeline_size - 1
    outer = outer_table(shape)

    name = "embedding.word_embeddings.weight"
    yield from _bucket("embeddings", version, exporter.collect({name: outer[name]}, prefix="", stage=0))
    for stage in range(groups.layout.pipeline_size):
        for local, layer in enumerate(groups.layout.layers(stage, shape.num_layers)):
            tensors = exporter.collect(layer_table(shape, layer), prefix=f"decoder.layers.{local}.", stage=stage)
            yield from _bucket(f"layers.{layer}", version, tensors)
    names = ["decoder.final_layernorm.weight"] + ([] if shape.tied_embeddings else ["output_layer.weight"])
    tensors = exporter.collect({name: outer[name] for name in names}, prefix="", stage=last_stage)
    yield from _bucket("final", version, tensors)


def _bucket(layer: str, version: int, tensors: dict[str, Tensor] | None) -> Iterator[WeightBucket]:
    if tensors is not None:
        yield WeightBucket(version=version, layer=layer, tensors=tensors)


class _Exporter:
    def __init__(self, parameters: Mapping[str, Tensor], shape: ModelShape, groups: ParallelGroups) -> None:
        self.parameters = parameters
        self.shape = shape
        self.groups = groups
        # Rank 0 must know what a later stage sends without asking: layers are alike, and so are their parameters.
        self.first_layer = {
            name.removeprefix("decoder.layers.0."): (tuple(tensor.shape), tensor.dtype)
            for name, tensor in parameters.items()
            if name.startswith("decoder.layers.0.")
        }

    def collect(self, table: Mapping[str, mapping.Mapping], *, prefix: str, stage: int) -> dict[str, Tensor] | None:
        """The Hugging Face tensors of `table`'s parameters, which live on pipeline stage `stage`; None off rank 0."""
        groups = self.groups
        is_root = groups.rank == 0
        if groups.pipeline_rank != stage and not is_root:
            return None
        collected: dict[str, Tensor] = {}
        for name, rule in table.items():
            if groups.pipeline_rank == stage:
                tensor = self.parameters.get(prefix + name)
                if tensor is None:
                    continue  # this build of the layer keeps the parameter under its other name
                shards = self._gather(tensor.detach().contiguous(), rule.is_sharded)
                if shards is None:
                    continue
                if not is_root:
                    self._send(shards)
                    continue
            else:
                received = self._receive(name, rule.is_sharded, stage)
                if received is None:
                    continue
                shards = received
            collected |= rule.export(shards)
        return collected if is_root else None

    def _gather(self, tensor: Tensor, is_sharded: bool) -> Sequence[Tensor] | None:
        """Every tensor rank's shard, on tensor rank 0; None on the others."""
        size = self.groups.layout.tensor_size
        if not is_sharded or size == 1:
            return [tensor] if self.groups.tensor_rank == 0 else None
        shards = [torch.empty_like(tensor) for _ in range(size)]
        dist.all_gather(shards, tensor, group=self.groups.tensor)
        return shards if self.groups.tensor_rank == 0 else None

    def _send(self, shards: Sequence[Tensor]) -> None:
        dist.send(torch.stack(list(shards)), group=self.groups.pipeline, group_dst=0)

    def _receive(self, name: str, is_sharded: bool, stage: int) -> Sequence[Tensor] | None:
        found = self.first_layer.get(name) or self._outer_shape(name)
        if found is None:
            return None
        shape, dtype = found
        count = self.groups.layout.tensor_size if is_sharded else 1
        stacked = torch.empty((count, *shape), dtype=dtype, device=self.groups.device)
        dist.recv(stacked, group=self.groups.pipeline, group_src=stage)
        return list(stacked.unbind())

    def _outer_shape(self, name: str) -> tuple[tuple[int, ...], torch.dtype] | None:
        """Shape and dtype of one rank's part of a parameter that only the last stage has."""
        dtype = next(iter(self.parameters.values())).dtype
        tensor_size = self.groups.layout.tensor_size
        rows = padded_vocab_size(self.shape, tensor_size) // tensor_size
        return {
            "decoder.final_layernorm.weight": ((self.shape.hidden_size,), dtype),
            "output_layer.weight": ((rows, self.shape.hidden_size), dtype),
        }.get(name)
