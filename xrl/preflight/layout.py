"""Ranks, and how the model is cut over them."""

from __future__ import annotations

import math
import os

from xrl.config import ParallelConfig, SettingsError
from xrl.launch.variables import rank_number
from xrl.models.shape import ModelShape
from xrl.parallel.layout import Layout

_MOST_RANKS = 10_000


def check_layout(parallel: ParallelConfig, shape: ModelShape, *, world_size: int) -> None:
    """Refuse a layout that does not divide the ranks or the model, and say which ones would.

    Raises:
        SettingsError: the world size, the heads, the MLP, the experts or the layers do not divide as they must.
    """
    _check_one_host(world_size)
    _check_world_size(parallel, world_size)
    _check_tensor_parallel(parallel.tensor_model_parallel_size, shape)
    _check_experts(parallel, shape, world_size)
    _check_pipeline_parallel(parallel, shape)


def _check_one_host(world_size: int) -> None:
    on_this_host = rank_number(os.environ, "LOCAL_WORLD_SIZE", world_size)
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
    cut = {"attention heads": shape.num_heads}
    latent, experts = shape.latent, shape.experts
    if latent is None:
        cut["key/value heads"] = shape.num_kv_heads
    else:
        cut["latent and rotated dimensions of keys"] = latent.kv_lora_rank + latent.qk_rope_head_dim
        if latent.q_lora_rank is not None:
            cut["latent dimensions of queries (q_lora_rank)"] = latent.q_lora_rank
    if not shape.has_experts(0):
        cut["MLP neurons (intermediate_size)"] = shape.ffn_hidden_size
    if experts is not None:
        cut["neurons of an expert (moe_intermediate_size)"] = experts.ffn_hidden_size
    for what, count in cut.items():
        if count % size:
            raise SettingsError(
                f"--tensor-model-parallel-size {size} does not divide the model's {count} {what}: "
                f"{_divisors(math.gcd(*cut.values()))} would work"
            )


def _check_experts(parallel: ParallelConfig, shape: ModelShape, world_size: int) -> None:
    size, tensor = parallel.expert_model_parallel_size, parallel.tensor_model_parallel_size
    flag = f"--expert-model-parallel-size {size}"
    if shape.experts is None:
        if size > 1:
            raise SettingsError(f"{flag} needs a model with experts, {shape.architecture} has none: leave it out")
        return
    # Without it every tensor rank would send all tokens to the experts, which megatron-core refuses.
    if tensor > 1 and not parallel.sequence_parallel:
        raise SettingsError(
            f"--tensor-model-parallel-size {tensor} needs --sequence-parallel with a model that has experts"
        )
    num_experts = shape.experts.num_experts
    replicas = world_size // (tensor * parallel.pipeline_model_parallel_size * parallel.context_parallel_size)
    if num_experts % size or replicas % size:
        raise SettingsError(
            f"{flag} must divide the model's {num_experts} experts and the {replicas} data-parallel ranks: "
            f"{_divisors(math.gcd(num_experts, replicas))} would work"
        )


def _check_pipeline_parallel(parallel: ParallelConfig, shape: ModelShape) -> None:
    size = parallel.pipeline_model_parallel_size
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    if size == 1 and (first or last):
        raise SettingsError(
            "--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-layers need "
            "--pipeline-model-parallel-size > 1, got 1"
        )
    try:
        layout = Layout(tensor_size=1, pipeline_size=size, first_stage_layers=first, last_stage_layers=last)
        layout.chunks(shape.num_layers)
    except ValueError as error:
        raise SettingsError(f"--pipeline-model-parallel-size {size}: {error}") from error


def _nearest_multiples(number: int, step: int) -> str:
    below = number // step * step
    return f"{below} or {below + step}" if below else str(step)


def _divisors(number: int) -> str:
    # As many ranks as there may be, and not as many numbers as a damaged config.json may ask for.
    *others, last = [str(divisor) for divisor in range(1, min(number, _MOST_RANKS) + 1) if number % divisor == 0]
    return f"{', '.join(others)} or {last}" if others else last
