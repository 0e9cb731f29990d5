"""Fill this rank's part of a model from a Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel

from xrl.models.shape import ModelShape
from xrl.parallel.groups import ParallelGroups
from xrl.weights.hf_files import HuggingFaceReader
from xrl.weights.mapping import Mapping, Rank
from xrl.weights.qwen import layer_table, outer_table


@torch.no_grad()
def load_weights(model: GPTModel, shape: ModelShape, groups: ParallelGroups, model_dir: Path) -> None:
    """Read this rank's slices of the checkpoint into the model's parameters."""
    rank = Rank(groups.tensor_rank, groups.layout.tensor_size)
    with HuggingFaceReader(model_dir) as reader:
        for name, parameter in model.named_parameters():
            value = parameter_mapping(name, shape, groups).load(reader.read, rank)
            if value.shape != parameter.shape:
                raise ValueError(
                    f"{name} needs shape {tuple(parameter.shape)}, the checkpoint gives {tuple(value.shape)}"
                )
            parameter.copy_(value)


def parameter_mapping(name: str, shape: ModelShape, groups: ParallelGroups) -> Mapping:
    """The mapping of one of this rank's parameters, by its name in the GPTModel."""
    prefix = "decoder.layers."
    if not name.startswith(prefix):
        return outer_table(shape)[name]
    local_layer, _, rest = name.removeprefix(prefix).partition(".")
    first = groups.layout.layers(groups.pipeline_rank, shape.num_layers).start
    return layer_table(shape, first + int(local_layer))[rest]
