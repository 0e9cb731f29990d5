"""The slices of a plan as views of tensors: what loading, export and conversion copy from and to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from xrl.weights.plan import ParameterPlan, Slice

# Weights of a rank by their name in its GPTModel, one mapping for each virtual pipeline stage.
Weights = Sequence[Mapping[str, Tensor]]
# Reads rows [start, stop) along a dimension of a Hugging Face tensor: (name, dim, start, stop) -> tensor.
ReadSlice = Callable[[str, int, int, int], Tensor]


def named_weights(model: torch.nn.Module) -> dict[str, Tensor]:
    """What a plan looks for in a model: parameters, and buffers (a router keeps its bias in one)."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def has_te_layers(weights: Iterable[str]) -> bool:
    """Whether the layers are transformer-engine's, by the norms inside their linear layers."""
    return any(name.endswith(".layer_norm_weight") for name in weights)


def find_name(parameter: ParameterPlan, weights: Weights) -> str:
    """The name, of several, under which the model has a parameter.

    Raises:
        ValueError: under none.
    """
    of_stage = weights[parameter.virtual_stage]
    for name in parameter.names:
        if name in of_stage:
            return name
    raise ValueError(f"the model has no parameter {' or '.join(parameter.names)}, which the plan of its shape needs")


def find_weight(parameter: ParameterPlan, weights: Weights) -> Tensor:
    """The tensor of a parameter.

    Raises:
        ValueError: the model does not have it, or in another shape.
    """
    name = find_name(parameter, weights)
    tensor = weights[parameter.virtual_stage][name]
    if tuple(tensor.shape) != parameter.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the plan of its shape needs {parameter.shape}")
    return tensor.detach()


def in_tensor(piece: Slice, tensor: Tensor) -> Tensor:
    """The slice's rows of the whole tensor: `dim` is split into (count, block)."""
    rows = tensor.narrow(piece.dim, piece.source, piece.source_stop - piece.source)
    return rows.unflatten(piece.dim, (piece.count, piece.block))


def in_parameter(piece: Slice, parameter: Tensor) -> Tensor:
    """The slice's rows of the parameter."""
    dim = piece.dim
    if piece.count == 1:
        return parameter.narrow(dim, piece.target, piece.block).unflatten(dim, (1, piece.block))
    first, offset = divmod(piece.target, piece.stride)
    strides = parameter.unflatten(dim, (-1, piece.stride))
    return strides.narrow(dim, first, piece.count).narrow(dim + 1, offset, piece.block)


def fill(parameter: ParameterPlan, tensor: Tensor, read: ReadSlice) -> None:
    """Fill a rank's parameter with its slices of the Hugging Face tensors; padding becomes zero.

    Raises:
        ValueError: `read` gives something of another shape.
    """
    if sum(piece.block * piece.count for piece in parameter.slices) != parameter.shape[_dim(parameter)]:
        tensor.zero_()
    for piece in parameter.slices:
        rows = read(piece.tensor, piece.dim, piece.source, piece.source_stop)
        needed = list(parameter.shape)
        needed[piece.dim] = piece.source_stop - piece.source
        if list(rows.shape) != needed:
            raise ValueError(
                f"rows {piece.source} to {piece.source_stop} of {piece.tensor} have shape {list(rows.shape)}, "
                f"{needed} is needed"
            )
        in_parameter(piece, tensor).copy_(rows.unflatten(piece.dim, (piece.count, piece.block)))


def _dim(parameter: ParameterPlan) -> int:
    return parameter.slices[0].dim if parameter.slices else 0
