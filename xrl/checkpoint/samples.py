"""The samples of a rollout as a file: what an update learned from, to be learned from again."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from xrl.config import SettingsError
from xrl.types import Sample

_ARRAYS = {
    "token_ids": np.int32,
    "trained": np.bool_,
    "rollout_logprobs": np.float32,
    "advantages": np.float32,
    "versions": np.int32,
}
_NUMBERS = {"prompt_length": np.int64, "group_id": np.int64, "episode_id": np.int64, "temperature": np.float64}


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """Write a rollout's samples; the file appears whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    tensors: dict[str, Tensor] = {"lengths": torch.tensor([len(each.token_ids) for each in samples])}
    for name, dtype in _ARRAYS.items():
        rows: list[Any] = [np.asarray(getattr(each, name), dtype) for each in samples]
        tensors[name] = torch.from_numpy(np.concatenate([np.zeros(0, dtype), *rows]))
    for name, dtype in _NUMBERS.items():
        tensors[name] = torch.from_numpy(np.array([getattr(each, name) for each in samples], dtype))
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(exist_ok=True)
        save_file(tensors, partial)
        os.replace(partial, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        partial.unlink(missing_ok=True)


def read_samples(path: Path) -> list[Sample]:
    """The samples that `write_samples` was given, to the bit.

    Raises:
        SettingsError: there is no such file, or it holds something else.
    """
    try:
        tensors = load_file(path)
        lengths = tensors["lengths"].tolist()
        arrays = {name: tensors[name].numpy() for name in _ARRAYS}
        numbers = {name: tensors[name].tolist() for name in _NUMBERS}
    except (OSError, SafetensorError, KeyError) as error:
        raise SettingsError(f"{path} holds no recorded samples: {error}") from error
    stops = np.cumsum(lengths).tolist()
    return [
        _sample({name: array[stop - length : stop] for name, array in arrays.items()}, numbers, index)
        for index, (length, stop) in enumerate(zip(lengths, stops, strict=True))
    ]


def _sample(arrays: Mapping[str, Any], numbers: Mapping[str, Sequence[Any]], index: int) -> Sample:
    return Sample(**arrays, **{name: values[index] for name, values in numbers.items()})
