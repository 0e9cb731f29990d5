"""What is said of a model's layers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from xrl.kernels.layers.choice import ONE_BY_ONE, ONE_CALL, choose_layer
from xrl.kernels.matmul import has_matmul
from xrl.models.choice import layer_kind, layer_lines
from xrl.models.shape import ExpertShape, ModelShape

DENSE = ModelShape(
    architecture="Qwen3ForCausalLM",
    num_layers=3,
    hidden_size=64,
    ffn_hidden_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=98,
    max_positions=256,
    norm_eps=1e-6,
    rope_base=100.0,
    tied_embeddings=False,
    qkv_bias=False,
    qk_norm=True,
)

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or not has_matmul(torch.ones(1, 1)), reason="this machine has other ways"
)


def lines(shape: ModelShape, *, dtype: torch.dtype = torch.float32, tensor_size: int = 1) -> list[str]:
    return list(layer_lines(shape, dtype=dtype, transformer_impl="auto", tensor_size=tensor_size))


def test_equal_layers_are_said_in_one_line() -> None:
    (line,) = lines(DENSE)
    assert line == f"layer: {ONE_CALL}, not transformer-engine because there is no CUDA device"
    (line,) = lines(DENSE, tensor_size=2)
    assert line.startswith(f"layer: {ONE_BY_ONE}, ") and "2 tensor ranks share it" in line


def test_layers_that_differ_are_said_one_run_after_the_other() -> None:
    experts = ExpertShape(
        num_experts=4, experts_per_token=2, ffn_hidden_size=32, normalize_top_k=True, first_dense_layers=1
    )
    first, rest = lines(dataclasses.replace(DENSE, experts=experts))
    assert first.startswith(f"layers 0 to 0: {ONE_CALL}, ")
    assert rest.startswith(f"layers 1 to 2: {ONE_BY_ONE}, ") and "it has experts" in rest


def test_the_size_of_the_mlp_is_that_of_its_three_matrices() -> None:
    assert layer_kind(DENSE).mlp_bytes == 4 * 3 * 64 * 128
    large = dataclasses.replace(DENSE, ffn_hidden_size=(64 << 20) // (4 * 3 * 64) + 1)
    assert choose_layer(layer_kind(large)).name == ONE_BY_ONE
