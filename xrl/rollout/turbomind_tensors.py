"""What TurboMind is sent: which models it computes as xrl trains them, and every tensor of each part of a model.

Checked here, because the compiled part ends the process at a wrong size, and leaves out a bias that it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from xrl.config import SettingsError
from xrl.config.json_file import read_json_object
from xrl.models.checks import checked_shape
from xrl.models.families import architecture_of
from xrl.models.shape import ModelShape, with_defaults
from xrl.rollout.engine import WrongWeights
from xrl.weights.plan import part_names, tensor_shapes

FINAL_NORM = "model.norm.weight"
# What TurboMind converts and xrl trains -> may have biases in its attention.
ARCHITECTURES: Mapping[str, bool] = {
    "LlamaForCausalLM": False,
    "MistralForCausalLM": False,
    "Qwen2ForCausalLM": True,
    "Qwen3ForCausalLM": True,
    "Qwen3MoeForCausalLM": True,
}
HEAD_DIMS = (64, 128, 256)  # of its attention kernels

Sizes = dict[str, tuple[int, ...]]  # by Hugging Face name


def supported_shape(model_dir: Path, *, max_model_len: int) -> ModelShape:
    """The model's shape, if TurboMind computes what config.json says; whole runs are checked before they start.

    Raises:
        SettingsError: it cannot be read, or TurboMind would leave something out.
    """
    file = model_dir / "config.json"
    config = read_json_object(file)
    architecture = architecture_of(config) or "none"
    if architecture not in ARCHITECTURES:
        raise SettingsError(f"{file}: engine turbomind runs {', '.join(ARCHITECTURES)}, found {architecture}")
    shape = checked_shape(config, file)
    needs = {
        f"a head_dim of {', '.join(map(str, HEAD_DIMS))}": (shape.head_dim in HEAD_DIMS, f"head_dim {shape.head_dim}"),
        "no biases in the attention": (
            ARCHITECTURES[architecture] or not (shape.qkv_bias or shape.out_bias),
            "some, which it would leave out",
        ),
        "an attention as wide as the hidden state": (  # where it makes up a bias after the attention
            shape.out_bias or not shape.qkv_bias or shape.num_heads * shape.head_dim == shape.hidden_size,
            f"{shape.num_heads} heads of {shape.head_dim} and hidden_size {shape.hidden_size}",
        ),
        "no biases in the MLP": (not shape.mlp_bias, "some, which it would leave out"),
        "full attention": (not _slides(config, max_model_len), f"sliding_window {config.get('sliding_window')}"),
        f"at least {max_model_len} positions": (
            max_model_len <= shape.max_positions,
            f"max_position_embeddings {shape.max_positions}",
        ),
    }
    for need, (is_met, found) in needs.items():
        if not is_met:
            raise SettingsError(f"{file}: engine turbomind needs {need}, found {found}")
    return shape


def _slides(config: Mapping[str, Any], max_model_len: int) -> bool:
    """Whether a window would cut into the run's sequences: TurboMind attends to everything."""
    if config.get("use_sliding_window") is False:  # Qwen has both keys
        return False
    window: int | None = with_defaults(config).get("sliding_window")
    return window is not None and window < max_model_len


def expected_parts(shape: ModelShape) -> dict[str, Sizes]:
    """Part of the model ("embeddings", "layers.0", ..., "final") -> its tensors."""
    return {part: tensor_shapes(shape, part) for part in part_names(shape)}


def check_part(part: str, tensors: Mapping[str, Tensor], parts: Mapping[str, Sizes]) -> None:
    """Refuse what is not the whole of one part of the model.

    Raises:
        WrongWeights: names the part and the tensor.
    """
    where = f"weight update, {part}"
    if part not in parts:
        raise WrongWeights(f"{where}: the model has no such part")
    expected = parts[part]
    for name, tensor in tensors.items():
        if name not in expected:
            raise WrongWeights(f"{where}: the model has no tensor {name!r} there")
        if tuple(tensor.shape) != expected[name]:
            raise WrongWeights(f"{where}: {name} must be of size {list(expected[name])}, got {list(tensor.shape)}")
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise WrongWeights(f"{where}: TurboMind takes only whole parts, missing {', '.join(missing)}")
