"""Whole models on one rank: decoder layers in one call against the same layers the way megatron-core goes."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from tests.samples import sample
from xrl.parallel.cpu import prepare_megatron_for_cpu

prepare_megatron_for_cpu()

import xrl.kernels.layers.gated_mlp  # noqa: E402
import xrl.models.decoder_layer  # noqa: E402
from xrl.config import ModelConfig, ParallelConfig  # noqa: E402
from xrl.data.packing import Pack, pack, pad  # noqa: E402
from xrl.kernels.layers.choice import ONE_BY_ONE, ONE_CALL, choose_layer  # noqa: E402
from xrl.models.build import build_model, transformer_config  # noqa: E402
from xrl.models.choice import layer_kind  # noqa: E402
from xrl.models.packed import attention_inputs  # noqa: E402
from xrl.models.shape import ModelShape  # noqa: E402
from xrl.parallel.groups import ParallelGroups  # noqa: E402
from xrl.parallel.megatron import initialize, shutdown  # noqa: E402

QWEN3 = ModelShape(
    architecture="Qwen3ForCausalLM",
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=98,
    max_positions=256,
    norm_eps=1e-6,
    rope_base=1e4,
    tied_embeddings=True,
    qkv_bias=False,
    qk_norm=True,
)
SHAPES = {"qwen3": QWEN3, "qwen2": dataclasses.replace(QWEN3, qk_norm=False, qkv_bias=True)}
Recompute = Literal["full", "selective"] | None
FROZEN: dict[str, Callable[[str], bool]] = {
    "nothing": lambda name: False,
    "embeddings and first layer": lambda name: "embed" in name or "layers.0." in name,
    "all but one norm": lambda name: "layers.1.pre_mlp_layernorm" not in name,
}


def make_packs() -> dict[str, Pack]:
    numbers = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [numbers.randrange(98) for _ in range(count)]

    samples = [
        sample(
            tokens(5 + group), tokens(3 + 4 * number), logprobs=[0.0] * (3 + 4 * number), advantage=0.0, group_id=group
        )
        for group in range(3)
        for number in range(3)
    ]
    return {
        "packed": pack(samples, share_prompts=True, multiple=64),
        "padded": pad(samples, multiple=4),
    }


def run(
    groups: ParallelGroups, shape: ModelShape, packed: Pack, recompute: Recompute, is_frozen: Callable[[str], bool]
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Logits, and the gradient of each parameter."""
    settings = ModelConfig(model=Path("unused"), bf16=False, recompute_granularity=recompute)
    config = transformer_config(shape, settings, ParallelConfig(), groups.layout, transformer_engine=False)
    model = build_model(shape, config, groups, transformer_engine=False)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator) * 0.1
        parameter.data.copy_(1 + values if "norm" in name else values)
        parameter.requires_grad_(not is_frozen(name))
    ids, positions = (
        torch.tensor(numbers).view(packed.padded_shape or (1, -1))
        for numbers in (packed.token_ids, packed.position_ids)
    )
    inputs = attention_inputs(packed, shape, dtype=torch.float32, device=torch.device("cpu"))
    logits = model(input_ids=ids, position_ids=positions, attention_mask=None, packed_seq_params=inputs)
    (logits * torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))).sum().backward()
    return logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def main() -> None:
    torch.set_num_threads(1)
    groups = initialize(ParallelConfig(), seed=1)
    one_call = xrl.models.decoder_layer.train_layer
    most_bytes = xrl.kernels.layers.gated_mlp._MOST_PACKED_BYTES
    calls: list[Tensor] = []

    def counted(x: Tensor, *arguments: object) -> Tensor:
        calls.append(x)
        return one_call(x, *arguments)  # type: ignore[arg-type]

    xrl.models.decoder_layer.train_layer = counted
    recomputes: tuple[Recompute, ...] = (None, "full", "selective")
    for (model, shape), (packing, packed), recompute, frozen in itertools.product(
        SHAPES.items(), make_packs().items(), recomputes, FROZEN
    ):
        if recompute == "full" and frozen != "nothing":
            continue  # megatron-core's checkpoints give no gradient where their input has none
        case = f"{model}, {packing}, recompute {recompute}, frozen: {frozen}"
        calls.clear()
        logits, gradients = run(groups, shape, packed, recompute, FROZEN[frozen])
        assert len(calls) == (2 * shape.num_layers if recompute == "full" else shape.num_layers), case
        assert choose_layer(layer_kind(shape)).name == ONE_CALL, case
        calls.clear()
        xrl.kernels.layers.gated_mlp._MOST_PACKED_BYTES = 0  # as a large MLP has it
        assert choose_layer(layer_kind(shape)).name == ONE_BY_ONE, case
        expected, expected_gradients = run(groups, shape, packed, recompute, FROZEN[frozen])
        xrl.kernels.layers.gated_mlp._MOST_PACKED_BYTES = most_bytes
        assert not calls, case
        assert difference(logits, expected) < 1e-5, case
        for name, gradient in gradients.items():
            other = expected_gradients[name]
            assert (gradient is None) == (other is None), (case, name)
            if gradient is not None and other is not None:
                assert difference(gradient, other) < 1e-5, (case, name, difference(gradient, other))
    shutdown()


if __name__ == "__main__":
    main()
