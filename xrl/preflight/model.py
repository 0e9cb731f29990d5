"""config.json: there, readable, and of a decoder whose maths we compute."""

from __future__ import annotations

import re
from pathlib import Path

from xrl.config import SettingsError
from xrl.config.json_file import read_json_object
from xrl.models.checks import checked_shape
from xrl.models.shape import ModelShape

# owner/name, as the hub spells a model; a path of two parts looks the same.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def check_model(folder: Path) -> ModelShape:
    """The shape of the model in `folder`.

    Raises:
        SettingsError: no folder, no config.json, or a model that we do not train.
    """
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        needed = "give a Hugging Face folder with config.json and safetensors"
        if _HUB_NAME.fullmatch(str(folder)) and not folder.exists():
            needed += f", or get it from the hub first: hf download {folder} --local-dir models/{folder.name}"
        raise SettingsError(f"--model {folder} {problem}: {needed}")
    file = folder / "config.json"
    if not file.is_file():
        raise SettingsError(f"--model {folder} has no config.json: give a Hugging Face folder")
    config = read_json_object(file)
    return checked_shape(config, file)
