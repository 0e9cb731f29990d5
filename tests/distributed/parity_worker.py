"""One rank of the parity test: the same batch and weights at whatever layout torchrun starts this with.

Rank 0 writes what it saw of each model to --out: loss, whole gradients, gradient norm, weights after the last update.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
from pathlib import Path

import torch

from tests.samples import sample
from xrl.actor.actor import Actor
from xrl.algorithms.grpo import GRPO
from xrl.config import (
    AlgorithmConfig,
    ModelConfig,
    OptimizerConfig,
    PackingConfig,
    ParallelConfig,
)
from xrl.parallel.groups import ParallelGroups
from xrl.parallel.megatron import initialize, shutdown
from xrl.types import Sample
from xrl.weights.export import export_weights

PACKINGS = ("shared", "packed", "padded")
MICROBATCHES = (1, 4)  # on each replica
# How log-probs and loss are computed: by log-probs and autograd or by the loss that forms its gradient at once, and
# from logits or from hidden states.
WAYS = {
    "plain": {"fused": False, "linear": False},
    "fused": {"fused": True, "linear": False},
    "linear": {"fused": False, "linear": True},
    "linear fused": {"fused": True, "linear": True},
}


def make_samples(vocab_size: int) -> list[Sample]:
    """16 groups of 4 answers with uneven lengths, answers of one token among them."""
    rng = random.Random(0)
    samples = []
    for group_id in range(16):
        prompt = [rng.randrange(vocab_size) for _ in range(rng.randint(3, 12))]
        for _ in range(4):
            response = [rng.randrange(vocab_size) for _ in range(rng.choice((1, 5, 9, 16)))]
            logprobs = [-4.5 - 0.3 * rng.random() for _ in response]
            of_group = {"group_id": group_id, "advantage": rng.gauss(0, 1), "temperature": 0.7}
            samples.append(sample(prompt, response, logprobs=logprobs, **of_group))
    return samples


def packing_config(packing: str, num_microbatches: int, num_replicas: int, samples: list[Sample]) -> PackingConfig:
    """Settings that give every replica `num_microbatches` micro-batches of these samples."""
    from xrl.data.packing import plan_microbatches, size_of

    config = PackingConfig(share_prompt_prefix=packing == "shared")
    if packing == "padded":
        return dataclasses.replace(config, micro_batch_size=len(samples) // (num_microbatches * num_replicas))
    for budget in range(4000, 20, -4):
        plan = plan_microbatches(
            [size_of(each) for each in samples],
            num_replicas=num_replicas,
            max_tokens=budget,
            share_prompts=packing == "shared",
        )
        if len(plan[0]) == num_microbatches:
            return dataclasses.replace(config, max_tokens_per_microbatch=budget)
    raise AssertionError(f"no token budget gives {num_microbatches} micro-batches")


def make_actor(arguments: argparse.Namespace, groups: ParallelGroups, packing: PackingConfig, *, linear: bool) -> Actor:
    return Actor(
        model=ModelConfig(
            model=arguments.model,
            bf16=False,
            recompute_granularity=arguments.recompute,
            fused_linear_logprob=linear,
            kernel_backend=arguments.backend,
        ),
        packing=packing,
        parallel=ParallelConfig(
            tensor_model_parallel_size=arguments.tp,
            pipeline_model_parallel_size=arguments.pp,
            expert_model_parallel_size=arguments.ep,
            sequence_parallel=arguments.sp,
            use_distributed_optimizer=arguments.distributed_optimizer,
        ),
        optimizer=OptimizerConfig(lr=1e-3, adam_eps=1e-6, weight_decay=0.01, clip_grad=0.05),
        groups=groups,
        num_updates=arguments.updates,
        keeps_reference=True,
    )


def run_case(
    arguments: argparse.Namespace,
    groups: ParallelGroups,
    packing: str,
    num_microbatches: int,
    *,
    fused: bool,
    linear: bool,
) -> dict:
    vocab_size = arguments.vocab_size
    samples = make_samples(vocab_size)
    config = packing_config(packing, num_microbatches, groups.layout.data_size, samples)
    actor = make_actor(arguments, groups, config, linear=linear)
    algorithm = GRPO(AlgorithmConfig(old_logprobs="rollout", kl_coef=0.05, entropy_coef=0.01))
    if not fused:
        algorithm.fused_loss = None
    seen: dict[str, list] = {"loss": [], "grad_norm": [], "kl": []}
    gradients: dict[str, torch.Tensor] = {}
    has_run = False

    step = actor.optimizer.step

    def step_and_keep_gradients():
        nonlocal has_run
        # After the reduction, before clipping: what every layout must agree on.
        if not has_run:
            has_run = True
            for bucket in export_weights(whole_gradients(actor), actor.shape, groups, version=0):
                gradients.update({name: tensor.clone() for name, tensor in bucket.tensors.items()})
        return step()

    actor.optimizer.step = step_and_keep_gradients
    for _ in range(arguments.updates):
        (report,) = actor.learn(samples, algorithm)
        seen["loss"].append(report.metrics["loss"].value)
        seen["kl"].append(report.metrics["kl"].value)
        seen["grad_norm"].append(report.grad_norm)
    weights = {name: tensor.clone() for bucket in actor.weights(version=1) for name, tensor in bucket.tensors.items()}
    return {**seen, "gradients": gradients, "weights": weights}


def whole_gradients(actor: Actor) -> dict[str, torch.Tensor]:
    """Each parameter's reduced gradient; the distributed optimizer leaves only a share of it on each replica."""
    if actor.parallel.use_distributed_optimizer:
        for buffer in actor.ddp.buffers:
            for bucket in buffer.buckets:
                share = bucket.grad_data.view(actor.groups.layout.data_size, -1)[actor.groups.data_rank].clone()
                torch.distributed.all_gather_into_tensor(bucket.grad_data, share, group=actor.groups.data)
    # Buffers (a router's bias on its scores) are exported with the weights, but not learnt.
    constant = {name: torch.zeros_like(buffer) for name, buffer in actor.model.named_buffers()}
    return constant | {name: parameter.main_grad for name, parameter in actor.model.named_parameters()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=Path, nargs="+")
    parser.add_argument("--vocab-size", type=int)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--sp", action="store_true")
    parser.add_argument("--distributed-optimizer", action="store_true")
    parser.add_argument("--recompute", default=None)
    parser.add_argument("--ways", choices=WAYS, nargs="+")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--updates", type=int, default=3)
    parser.add_argument("--packing", choices=PACKINGS, nargs="+", default=PACKINGS)
    parser.add_argument("--microbatches", type=int, nargs="+", default=MICROBATCHES)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parallel = ParallelConfig(
        tensor_model_parallel_size=arguments.tp,
        pipeline_model_parallel_size=arguments.pp,
        expert_model_parallel_size=arguments.ep,
    )
    groups = initialize(parallel, seed=1)
    results: dict[str, dict] = {}
    for model in arguments.models:
        of_model = argparse.Namespace(**vars(arguments), model=model)
        results[model.name] = {
            (way, packing, count): run_case(of_model, groups, packing, count, **WAYS[way])
            for way in arguments.ways
            for packing in arguments.packing
            for count in arguments.microbatches
        }
    if groups.rank == 0:
        torch.save(results, arguments.out)
    shutdown()


if __name__ == "__main__":
    main()
