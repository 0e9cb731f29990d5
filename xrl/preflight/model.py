"""config.json: there, readable, and of a decoder whose maths we compute."""

from __future__ import annotations

from pathlib import Path

from xrl.config import SettingsError
from xrl.config.json_file import read_json_object
from xrl.models.checks import checked_shape
from xrl.models.shape import ModelShape


def check_model(folder: Path) -> ModelShape:
    """The shape of the model in `folder`.

    Raises:
        SettingsError: no folder, no config.json, or a model that we do not train.
    """
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise SettingsError(f"--model {folder} {problem}: give a Hugging Face folder with config.json and safetensors")
    file = folder / "config.json"
    if not file.is_file():
        raise SettingsError(f"--model {folder} has no config.json: give a Hugging Face folder")
    config = read_json_object(file)
    return checked_shape(config, file)
