"""Whatever else of a run has a state: small values go into the manifest, arrays into a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


class Stateful(Protocol):
    """Something that goes on where it was."""

    def state_dict(self) -> Mapping[str, Any]:
        """What JSON can say, and at its top level NumPy arrays."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Be as it was when `state_dict` gave `state`."""
        ...


def take_states(parts: Mapping[str, Stateful]) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor]]:
    """The states of all parts, as they are now: their values, and their arrays by `part.name`.

    Raises:
        RuntimeError: a part has values that JSON does not have.
    """
    values: dict[str, dict[str, Any]] = {}
    arrays: dict[str, Tensor] = {}
    for name, part in parts.items():
        state = part.state_dict()
        # Copies: they are written later, and the part goes on meanwhile.
        arrays |= {
            f"{name}.{key}": torch.from_numpy(np.array(each, order="C"))
            for key, each in state.items()
            if _is_array(each)
        }
        try:
            said = json.dumps({key: each for key, each in state.items() if not _is_array(each)})
        except (TypeError, ValueError) as error:
            raise RuntimeError(f"the state of {name} holds what JSON cannot say: {error}") from error
        values[name] = json.loads(said)
    return values, arrays


def give_states(
    parts: Mapping[str, Stateful], values: Mapping[str, Mapping[str, Any]], arrays: Mapping[str, Tensor]
) -> None:
    """Load into every part what `take_states` took of it; a part that had none begins anew."""
    for name, part in parts.items():
        if name in values:
            own = {key.removeprefix(f"{name}."): each for key, each in arrays.items() if key.startswith(f"{name}.")}
            part.load_state_dict({**values[name], **{key: tensor.numpy() for key, tensor in own.items()}})


def _is_array(value: object) -> bool:
    return isinstance(value, np.ndarray)
