"""Start torch.distributed and megatron-core; the only room that touches megatron-core's global groups."""

from __future__ import annotations

import math
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from xrl.config import ParallelConfig, SettingsError
from xrl.launch.variables import rank_number
from xrl.parallel.cpu import prepare_megatron_for_cpu
from xrl.parallel.gloo import one_event_loop
from xrl.parallel.groups import ParallelGroups
from xrl.parallel.layout import Layout
from xrl.parallel.recorder import TORCH_GRACE_S, switch_on

# On the control group ranks wait for rank 0: for samples, judges, evaluations, checkpoints. Each of those has time-outs
# of its own, which rank 0 reports; a rank that dies closes its connections, which ends the wait of all others; and for
# one that is stopped or hangs there is xrl.launch.watch.
CONTROL_TIMEOUT = timedelta(days=365)


def initialize(config: ParallelConfig, *, seed: int) -> ParallelGroups:
    """Join the world torchrun describes (or be a world of one) and lay the model-parallel groups over it."""
    device = _device(config)
    world_size = rank_number(os.environ, "WORLD_SIZE", 1)
    rank = rank_number(os.environ, "RANK", 0)
    timeout = timedelta(minutes=config.distributed_timeout_minutes, seconds=TORCH_GRACE_S)
    backend = config.distributed_backend
    if backend == "auto":
        backend = "nccl" if device.type == "cuda" else "gloo"

    prepare_megatron_for_cpu()
    switch_on(os.environ)
    from megatron.core import parallel_state, tensor_parallel

    with one_event_loop():
        if "MASTER_ADDR" in os.environ:
            dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout)
        else:
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(backend, rank=0, world_size=1, store=store, timeout=timeout)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor_model_parallel_size,
            pipeline_model_parallel_size=config.pipeline_model_parallel_size,
            context_parallel_size=config.context_parallel_size,
            expert_model_parallel_size=config.expert_model_parallel_size,
            distributed_timeout_minutes=math.ceil(timeout.total_seconds() / 60),
        )
        control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT, group_desc="control")
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return ParallelGroups(
        layout=Layout.of_world(
            world_size,
            tensor_size=config.tensor_model_parallel_size,
            pipeline_size=config.pipeline_model_parallel_size,
            expert_size=config.expert_model_parallel_size,
            first_stage_layers=config.decoder_first_pipeline_num_layers,
            last_stage_layers=config.decoder_last_pipeline_num_layers,
        ),
        device=device,
        rank=rank,
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        data_rank=parallel_state.get_data_parallel_rank(),
        tensor=parallel_state.get_tensor_model_parallel_group(),
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        data=parallel_state.get_data_parallel_group(),
        expert_rank=parallel_state.get_expert_model_parallel_rank(),
        expert=parallel_state.get_expert_model_parallel_group(),
        control=control,
    )


def shutdown() -> None:
    """Leave the groups; safe to call when they were never made."""
    if not dist.is_initialized():
        return
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def _device(config: ParallelConfig) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if config.distributed_backend == "gloo":
        raise SettingsError(
            "--distributed-backend gloo trains on the CPU, but CUDA devices are visible: "
            "hide them with CUDA_VISIBLE_DEVICES="
        )
    device = torch.device("cuda", rank_number(os.environ, "LOCAL_RANK", 0))
    torch.cuda.set_device(device)
    return device
