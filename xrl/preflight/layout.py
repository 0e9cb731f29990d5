"""Ranks, and how the model is cut over them."""

from __future__ import annotations

import math
import os

from xrl.config import ParallelConfig, SettingsError
from xrl.models.shape import ModelShape


def check_layout(parallel: ParallelConfig, shape: ModelShape, *, world_size: int) -> None:
    """Refuse a layout that does not divide the ranks or the model, and say which ones would.

    Raises:
        SettingsError: the world size, the heads, the MLP or the layers do not divide evenly.
    """
    _check_one_host(world_size)
    _check_world_size(parallel, world_size)
    _check_tensor_parallel(parallel.tensor_model_parallel_size, shape)
    _check_pipeline_parallel(parallel.pipeline_model_parallel_size, shape)


def _check_one_host(world_size: int) -> None:
    on_this_host = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    if on_this_host != world_size:
        raise SettingsError(
            f"the run spans several hosts ({on_this_host} of {world_size} ranks are on this one), but rollout workers "
            f"and the weights they take share one host so far: start all ranks on one"
        )


def _check_world_size(parallel: ParallelConfig, world_size: int) -> None:
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    model_size = tensor * pipeline * parallel.context_parallel_size
    if world_size % model_size:
        raise SettingsError(
            f"--tensor-model-parallel-size {tensor} x --pipeline-model-parallel-size {pipeline} x "
            f"--context-parallel-size {parallel.context_parallel_size} = {model_size} does not divide the {world_size} "
            f"ranks of the run: start {_nearest_multiples(world_size, model_size)} ranks (--nproc-per-node)"
        )


def _check_tensor_parallel(size: int, shape: ModelShape) -> None:
    cut = {
        "attention heads": shape.num_heads,
        "key/value heads": shape.num_kv_heads,
        "MLP neurons (intermediate_size)": shape.ffn_hidden_size,
    }
    for what, count in cut.items():
        if count % size:
            raise SettingsError(
                f"--tensor-model-parallel-size {size} does not divide the model's {count} {what}: "
                f"{_divisors(math.gcd(*cut.values()))} would work"
            )


def _check_pipeline_parallel(size: int, shape: ModelShape) -> None:
    if shape.num_layers % size:
        raise SettingsError(
            f"--pipeline-model-parallel-size {size} does not divide the model's {shape.num_layers} layers: "
            f"{_divisors(shape.num_layers)} would work"
        )


def _nearest_multiples(number: int, step: int) -> str:
    below = number // step * step
    return f"{below} or {below + step}" if below else str(step)


def _divisors(number: int) -> str:
    *others, last = [str(divisor) for divisor in range(1, number + 1) if number % divisor == 0]
    return f"{', '.join(others)} or {last}" if others else last
