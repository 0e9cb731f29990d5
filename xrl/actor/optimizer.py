"""megatron-core's optimizer and learning-rate schedule, from our settings."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from xrl.config import OptimizerConfig, ParallelConfig
from xrl.parallel.cpu import cuda_type_names


def wrap_data_parallel(model: GPTModel, parallel: ParallelConfig) -> DistributedDataParallel:
    """Gradient buffers, and their reduction over the data-parallel ranks."""
    wrapped = DistributedDataParallel(
        config=model.config,
        ddp_config=DistributedDataParallelConfig(
            use_distributed_optimizer=parallel.use_distributed_optimizer,
            grad_reduce_in_fp32=True,
            # Not overlapped with the backward pass: that waits for autograd's hook on every weight, and gradients that
            # our kernels add to the buffer themselves (kernels/layers/linear.py, train_layer.py) call none.
            overlap_grad_reduce=False,
        ),
        module=model,
    )
    # Sums the gradients that data parallelism does not know of: tied embeddings, norms under sequence parallelism.
    model.config.finalize_model_grads_func = finalize_model_grads
    return wrapped


def build_optimizer(
    model: DistributedDataParallel, config: OptimizerConfig, parallel: ParallelConfig, *, dtype: torch.dtype
) -> MegatronOptimizer:
    """AdamW on fp32 main weights, clipped by the global gradient norm."""
    with cuda_type_names():
        optimizer = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=config.lr,
                min_lr=config.min_lr,
                weight_decay=config.weight_decay,
                adam_beta1=config.adam_beta1,
                adam_beta2=config.adam_beta2,
                adam_eps=config.adam_eps,
                clip_grad=config.clip_grad,
                bf16=dtype == torch.bfloat16,
                params_dtype=dtype,
                use_distributed_optimizer=parallel.use_distributed_optimizer,
            ),
            [model],
        )
    model.config.grad_scale_func = optimizer.scale_loss
    return optimizer


def build_schedule(
    optimizer: MegatronOptimizer, config: OptimizerConfig, *, num_updates: int
) -> OptimizerParamScheduler:
    """Linear warm-up, then constant, linear or cosine down to `min_lr`.

    Update i of n warm-up updates, i from 1, has lr * i / n; the decay begins with the update after them.
    """
    decay_steps = config.lr_decay_iters or max(1, num_updates)
    num_warmup = config.lr_warmup_iters
    return OptimizerParamScheduler(
        optimizer,
        # Megatron gives the first update init_lr, and would waste it at 0: here it has its own share, from which the
        # rate rises in n - 1 steps.
        init_lr=config.lr / max(1, num_warmup),
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=max(0, num_warmup - 1),
        # A run that ends within its warm-up never decays; Megatron wants the one longer than the other all the same.
        lr_decay_steps=max(decay_steps, num_warmup),
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=num_updates,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
