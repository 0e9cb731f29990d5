"""How many blocks the KV cache may have: by its cap, by the memory that is free, and at least one sequence's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from tests.rollout.embedded.parts import CPU, MAX_MODEL_LEN, shape_of
from tests.tiny_models import make_model
from tests.weights.shapes import SHAPES
from xrl.config import SettingsError
from xrl.rollout.embedded import BLOCK_SIZE, bytes_per_block, least_blocks, missing_part, num_blocks
from xrl.rollout.embedded.cache_size import CPU_SHARE, CUDA_SHARE, max_blocks
from xrl.rollout.engine import Engine
from xrl.weights.plan import num_parameters

SHAPE = SHAPES["qwen3"]
EACH = bytes_per_block(SHAPE, 4)


def most(num_bytes: int | None, *, device: torch.device = CPU, num_workers: int = 1, max_model_len: int = 100) -> int:
    return max_blocks(
        SHAPE,
        torch.float32,
        device,
        max_model_len=max_model_len,
        num_bytes=num_bytes,
        num_workers_on_host=num_workers,
    )


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """So many bytes are free, of the host and of its GPU."""

    def set_free(num_bytes: int) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=num_bytes))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (num_bytes, 2 * num_bytes))

    return set_free


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (BLOCK_SIZE, 1), (BLOCK_SIZE + 1, 2), (100, 7)])
def test_a_block_that_is_begun_counts_whole(tokens: int, blocks: int) -> None:
    assert num_blocks(tokens) == blocks


def test_a_block_holds_keys_and_values_of_all_layers() -> None:
    assert 2 * SHAPE.num_layers * SHAPE.num_kv_heads * SHAPE.head_dim * BLOCK_SIZE * 4 == EACH
    assert bytes_per_block(replace(SHAPE, num_layers=3 * SHAPE.num_layers), 2) == 3 * EACH / 2


@pytest.mark.parametrize("prompt", range(1, 65))
def test_the_least_cache_holds_a_longest_sequence_wherever_its_prompt_ends(prompt: int) -> None:
    needed = num_blocks(prompt) + num_blocks(64 - prompt)
    assert needed <= least_blocks(64)


def test_the_cap_is_filled_with_whole_blocks() -> None:
    assert most(10 * EACH) == most(11 * EACH - 1) == 10


def test_without_a_cap_it_is_half_of_the_host_s_free_memory_beside_the_weights(free: Callable[[int], None]) -> None:
    weights = 4 * num_parameters(SHAPE)
    free(2 * (100 * EACH + weights))
    assert CPU_SHARE == 0.5 and most(None) == 100
    free(3 * 2 * (100 * EACH + weights))
    assert most(None, num_workers=3) == 100


def test_without_a_cap_it_is_nine_tenths_of_the_gpu_s_free_memory_beside_the_weights(
    free: Callable[[int], None],
) -> None:
    free(1000 * EACH + 4 * num_parameters(SHAPE))
    # However many workers the host has: each has its GPU.
    assert CUDA_SHARE == 0.9 and most(None, device=torch.device("cuda"), num_workers=8) == 900


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_host_without_enough_free_memory_is_refused_with_what_is_needed(
    free: Callable[[int], None], device: str
) -> None:
    free(10)  # less than the weights take
    needed = f"{least_blocks(100) * EACH / 1e9:.3g} GB"
    with pytest.raises(
        SettingsError,
        match=f"the memory that is free on {device}, of which the KV cache may take 0 GB, does not hold .*{needed}",
    ):
        most(None, device=torch.device(device))


def test_a_cap_below_one_sequence_is_refused_and_one_sequence_is_enough() -> None:
    enough = least_blocks(100) * EACH
    assert most(enough) == least_blocks(100)
    with pytest.raises(SettingsError, match=r"--kv-cache-gb \S+ does not hold .* one sequence of --max-model-len 100 "):
        most(enough - 1)


def test_a_cache_that_does_not_hold_one_sequence_is_refused_at_the_engine_s_start(
    make_engine: Callable[..., Engine],
) -> None:
    model = make_model()
    too_few: dict[str, Any] = {
        "kv_cache_bytes": (least_blocks(MAX_MODEL_LEN) - 1) * bytes_per_block(shape_of(model), 4)
    }
    with pytest.raises(SettingsError, match=r"--kv-cache-gb .* one sequence of --max-model-len 128 tokens"):
        make_engine(model, **too_few)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("qwen3", None),
        ("qwen3_moe", None),
        ("qwen2_moe", "the shared expert of Qwen2MoeForCausalLM"),
        ("deepseek_v3", "the latent attention of DeepseekV3ForCausalLM"),
    ],
)
def test_what_of_a_model_is_not_computed_has_a_name(name: str, missing: str | None) -> None:
    assert missing_part(SHAPES[name]) == missing
