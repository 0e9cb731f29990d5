"""The table that says which code computes a layer: what it answers, and that this is what runs."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import pytest
import torch

from tests.kernels.layers.test_train_layer import HEAD_DIM, HIDDEN, make_layer, make_layer_inputs, normal
from xrl.kernels.layers.choice import (
    ONE_BY_ONE,
    ONE_CALL,
    PYTORCH,
    TRANSFORMER_ENGINE,
    LayerKind,
    choose_layer,
    describe_layers,
)
from xrl.kernels.layers.train_layer import has_train_layer
from xrl.kernels.matmul import has_matmul

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DENSE = LayerKind(device=CPU, dtype=torch.float32)

pytestmark = pytest.mark.skipif(not has_matmul(torch.ones(1, 1)), reason="no compiled products for this machine")


@pytest.mark.parametrize(
    ("changes", "name", "reason"),
    [
        ({}, ONE_CALL, "not transformer-engine because there is no CUDA device"),
        ({"transformer_impl": "local"}, ONE_CALL, "not transformer-engine because --transformer-impl local"),
        ({"transformer_impl": "transformer_engine"}, TRANSFORMER_ENGINE, ""),
        ({"dtype": torch.bfloat16}, ONE_BY_ONE, "not one call (CPU fp32) because it is bfloat16"),
        ({"tensor_size": 2}, ONE_BY_ONE, "because 2 tensor ranks share it"),
        ({"has_experts": True}, ONE_BY_ONE, "because it has experts"),
        ({"has_output_bias": True}, ONE_BY_ONE, "because its output projections have biases"),
        ({"mlp_bytes": 65 << 20}, ONE_BY_ONE, "because its MLP of 65 MiB is too large to be packed at each call"),
        ({"head_dim": 24}, PYTORCH, "not operations one by one (CPU) because heads of 24 are no multiple of 16"),
        ({"has_latent_attention": True}, PYTORCH, "because it is latent"),
        ({"has_latent_attention": True, "transformer_impl": "transformer_engine"}, PYTORCH, "always our own"),
        ({"device": CUDA}, PYTORCH, "because its kernels are for the CPU, not for cuda"),
        ({"dtype": torch.float64}, PYTORCH, "because it takes float32 and bfloat16, not float64"),
    ],
)
def test_each_fact_leads_to_its_way_and_to_a_reason(
    changes: dict[str, Any], name: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    choice = choose_layer(dataclasses.replace(DENSE, **changes))
    assert choice.name == name
    assert reason in str(choice) and str(choice).startswith(name)


@pytest.mark.parametrize("is_installed", [False, True])
def test_on_cuda_transformer_engine_is_taken_where_it_is_installed(
    is_installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    spec = importlib.util.find_spec("torch") if is_installed else None
    monkeypatch.setattr("xrl.kernels.layers.choice.find_spec", lambda _: spec)
    choice = choose_layer(LayerKind(device=CUDA, dtype=torch.bfloat16))
    assert choice.name == (TRANSFORMER_ENGINE if is_installed else PYTORCH)
    assert is_installed or "not transformer-engine because it is not installed" in str(choice)


def test_without_the_compiled_module_pytorch_computes_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("layers.self_attention", "matmul"):
        monkeypatch.setattr(f"xrl.kernels.{module}.native_module", lambda: None)
    assert "operations one by one (CPU) because xrl._C is not built" in str(choose_layer(DENSE))


@pytest.mark.parametrize("most_packed_bytes", [0, 64 << 20])
@pytest.mark.parametrize("head_dim", [HEAD_DIM, HEAD_DIM // 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_call_is_chosen_where_the_kernel_says_that_it_serves(
    dtype: torch.dtype, head_dim: int, most_packed_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xrl.kernels.layers.gated_mlp._MOST_PACKED_BYTES", most_packed_bytes)
    layer, inputs = make_layer(), make_layer_inputs(6, [6], [], [])
    inputs = dataclasses.replace(
        inputs, cos=inputs.cos[:, :head_dim].contiguous(), sin=inputs.sin[:, :head_dim].contiguous()
    )
    kind = LayerKind(
        device=CPU, dtype=dtype, head_dim=head_dim, mlp_bytes=4 * (layer.gate_up.numel() + layer.down.numel())
    )
    serves = has_train_layer(normal(6, HIDDEN, seed=10).to(dtype), layer, inputs)
    assert (choose_layer(kind).name == ONE_CALL) == serves


def test_the_table_has_a_line_for_every_way() -> None:
    lines = describe_layers().splitlines()
    assert lines[0].startswith("layer of a dense model: ")
    assert [line.split(":")[0].strip() for line in lines[1:]] == [TRANSFORMER_ENGINE, ONE_CALL, ONE_BY_ONE, PYTORCH]
