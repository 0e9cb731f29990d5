"""config.json: the decoder it describes, refused where we would compute something else than it says."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xrl.config import SettingsError
from xrl.models import ARCHITECTURES
from xrl.models.shape import ModelShape, model_shape

_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
)
_OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings")
_OPTIONAL_NUMBERS = ("rms_norm_eps", "rope_theta")


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
    architectures = config.get("architectures")
    found = architectures[0] if isinstance(architectures, list) and architectures else None
    if found not in ARCHITECTURES:
        raise SettingsError(
            f"{file}: architecture {found or 'none'} is not supported, the known ones are: {', '.join(ARCHITECTURES)}"
        )
    _check_sizes(config, file)
    _check_numbers(config, file)
    for problem in (*_unsupported(config, found), *_unsupported_rope(config)):
        raise SettingsError(f"{file}: {problem}")
    return _checked_shape(config, file)


def read_json_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        SettingsError: it cannot be read, or is something else.
    """
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise SettingsError(f"{file} cannot be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise SettingsError(f"{file}, line {error.lineno} is not JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{file} needs a JSON object, found a {type(content).__name__}")
    return content


def _check_sizes(config: Mapping[str, Any], file: Path) -> None:
    for name in (*_SIZES, *_OPTIONAL_SIZES):
        value = config.get(name)
        if value is None and name in _OPTIONAL_SIZES:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise SettingsError(f"{file}: {name} must be a whole number >= 1, found {json.dumps(value)}")


def _check_numbers(config: Mapping[str, Any], file: Path) -> None:
    rope = config.get("rope_parameters")
    inner = rope.get("rope_theta") if isinstance(rope, dict) else None
    found = {name: config.get(name) for name in _OPTIONAL_NUMBERS} | {"rope_parameters.rope_theta": inner}
    for name, value in found.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 < value < math.inf):
            raise SettingsError(f"{file}: {name} must be a number > 0, found {json.dumps(value)}")
    tied = config.get("tie_word_embeddings")
    if tied is not None and not isinstance(tied, bool):
        raise SettingsError(f"{file}: tie_word_embeddings must be true or false, found {json.dumps(tied)}")


def _checked_shape(config: Mapping[str, Any], file: Path) -> ModelShape:
    shape = model_shape(config)
    if shape.num_heads % shape.num_kv_heads:
        raise SettingsError(
            f"{file}: num_attention_heads {shape.num_heads} must be a multiple of "
            f"num_key_value_heads {shape.num_kv_heads}"
        )
    return shape


def _unsupported(config: Mapping[str, Any], architecture: str) -> list[str]:
    """Fields that change the maths in a way we do not compute, as ends of a sentence."""
    problems = []
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        problems.append(f"hidden_act {activation!r} is not supported, only 'silu' is")
    if config.get("use_sliding_window"):
        problems.append("use_sliding_window is true, but only full attention is supported: false is needed")
    other_layers = sorted(set(config.get("layer_types") or ()) - {"full_attention"})
    if other_layers:
        problems.append(f"layer_types has {other_layers[0]!r}, but only 'full_attention' is supported")
    if architecture == "Qwen3ForCausalLM" and config.get("attention_bias"):
        problems.append("attention_bias is true, but Qwen3 is supported without biases only: false is needed")
    if config.get("quantization_config"):
        problems.append("quantization_config is set, but only unquantised weights are trained")
    return problems


def _unsupported_rope(config: Mapping[str, Any]) -> list[str]:
    problems = []
    for name in ("rope_scaling", "rope_parameters"):
        rope = config.get(name) or {}
        if not isinstance(rope, dict):
            problems.append(f"{name} must be an object or null, found {json.dumps(rope)}")
            continue
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind != "default":
            problems.append(f"{name} has type {kind!r}, but rotary positions are supported without scaling only")
        if rope.get("partial_rotary_factor", 1) != 1:
            problems.append(f"{name} has a partial_rotary_factor, but only rotation of whole heads is supported")
        if any(isinstance(value, dict) for value in rope.values()):
            problems.append(f"{name} differs from layer to layer, but only one setting for all is supported")
    return problems
