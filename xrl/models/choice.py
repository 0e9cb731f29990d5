"""What `xrl.kernels.layers.choice` must know of a model's layers, and the lines that say what it chose."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Literal

import torch

from xrl.kernels.layers.choice import LayerKind, choose_layer
from xrl.models.shape import ModelShape


def layer_kind(
    shape: ModelShape,
    layer: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto",
    tensor_size: int = 1,
) -> LayerKind:
    """What the choice must know of one layer, counted from 0.

    Args:
        device: left out: where this machine trains.
    """
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return LayerKind(
        device=device,
        dtype=dtype,
        transformer_impl=transformer_impl,
        head_dim=shape.head_dim,
        mlp_bytes=4 * 3 * shape.ffn_hidden_size * shape.hidden_size // tensor_size,
        tensor_size=tensor_size,
        has_experts=shape.has_experts(layer),
        has_latent_attention=shape.latent is not None,
        has_output_bias=shape.out_bias or shape.mlp_bias,
    )


def layer_lines(
    shape: ModelShape,
    *,
    dtype: torch.dtype,
    transformer_impl: Literal["auto", "local", "transformer_engine"],
    tensor_size: int,
) -> Iterator[str]:
    """What computes the layers, and why nothing faster does: a line for all, or one for each run of equal layers."""
    choices = [
        str(
            choose_layer(
                layer_kind(shape, layer, dtype=dtype, transformer_impl=transformer_impl, tensor_size=tensor_size)
            )
        )
        for layer in range(shape.num_layers)
    ]
    if len(set(choices)) == 1:
        yield f"layer: {choices[0]}"
        return
    for choice, layers in groupby(range(shape.num_layers), key=choices.__getitem__):
        numbers = list(layers)
        yield f"layers {numbers[0]} to {numbers[-1]}: {choice}"
