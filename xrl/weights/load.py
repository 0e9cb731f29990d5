"""Fill this rank's part of a model from a Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel

from xrl.config import SettingsError
from xrl.models.shape import ModelShape
from xrl.parallel.groups import ParallelGroups
from xrl.weights.hf_files import HuggingFaceReader
from xrl.weights.plan import plan
from xrl.weights.slices import fill, find_weight, has_te_layers, named_weights


@torch.no_grad()
def load_weights(model: GPTModel, shape: ModelShape, groups: ParallelGroups, model_dir: Path) -> None:
    """Read this rank's slices of the checkpoint into the model's parameters: nothing else is read from disk.

    Raises:
        SettingsError: a tensor is missing or of another shape.
        ValueError: the model is not the one the plan describes.
    """
    weights = named_weights(model)
    planned = plan(shape, groups.layout, transformer_engine=has_te_layers(weights))
    missing = dict(model.named_parameters())
    with HuggingFaceReader(model_dir) as reader:
        for parameter in planned.parameters(groups.layout.place(groups.rank)):
            tensor = find_weight(parameter, [weights])
            try:
                fill(parameter, tensor, reader.read)
            except ValueError as error:
                raise SettingsError(f"{model_dir}: {error}") from error
            for name in parameter.names:
                missing.pop(name, None)
    if missing:
        raise ValueError(f"no mapping table fills {', '.join(missing)}")
