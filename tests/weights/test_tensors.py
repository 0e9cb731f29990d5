"""The tensors a checkpoint must hold are those that transformers writes."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from tests.tiny_models import FAMILIES, make_checkpoint
from xrl.models.shape import read_model_shape
from xrl.weights.plan import part_names, tensor_shapes

CASES = [(family, tied, {}) for family in FAMILIES for tied in (True, False)] + [
    ("llama", True, {"attention_bias": False}),
    ("llama", True, {"mlp_bias": False}),
    ("qwen3", True, {"attention_bias": True}),
    ("qwen3_moe", True, {"attention_bias": True}),
    ("qwen2_moe", True, {"qkv_bias": False}),
    ("internlm3", False, {"attention_bias": True, "mlp_bias": True}),
    ("deepseek_v3", False, {"q_lora_rank": None}),
]


@pytest.mark.parametrize(("family", "tied", "fields"), CASES, ids=str)
def test_expected_tensors_are_those_of_transformers(
    family: str, tied: bool, fields: dict[str, object], tmp_path: Path
) -> None:
    folder = make_checkpoint(tmp_path, family=family, tied=tied, with_tokenizer=False, **fields)
    shape = read_model_shape(folder)
    expected = {name: size for part in part_names(shape) for name, size in tensor_shapes(shape, part).items()}
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert expected == {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
