"""One rank of the logits test: the actor's logits of fixed sequences, for each checkpoint of a folder."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from tests.samples import sample
from xrl.parallel.cpu import prepare_megatron_for_cpu

prepare_megatron_for_cpu()

from xrl.actor.actor import Actor  # noqa: E402
from xrl.actor.microbatch import Microbatch  # noqa: E402
from xrl.config import ModelConfig, OptimizerConfig, PackingConfig, ParallelConfig  # noqa: E402
from xrl.data.packing import size_of  # noqa: E402
from xrl.parallel.groups import ParallelGroups  # noqa: E402
from xrl.parallel.megatron import initialize, shutdown  # noqa: E402


def build_actor(model: Path, parallel: ParallelConfig, groups: ParallelGroups) -> Actor:
    return Actor(
        model=ModelConfig(model=model, bf16=False),
        parallel=parallel,
        optimizer=OptimizerConfig(),
        packing=PackingConfig(micro_batch_size=1),
        groups=groups,
        num_updates=1,
    )


def whole_logits(actor: Actor, sequences: list[list[int]]) -> dict[int, torch.Tensor]:
    """The last stage's logits of each sequence over the whole vocabulary; empty on other stages. Collective."""
    groups = actor.groups
    samples = [
        # The last token is never fed to the model; a token more makes it see the whole sequence.
        sample(ids[:1], [*ids[1:], 0], logprobs=[0.0] * len(ids), advantage=0.0, group_id=i)
        for i, ids in enumerate(sequences)
    ]
    maker = dataclasses.replace(actor.microbatches, packing=PackingConfig(micro_batch_size=1))
    plan = maker.plan([size_of(each) for each in samples], range(len(samples)))
    microbatches = [
        maker.make([samples[index] for index in indices], [0.0] * len(indices)) for indices in plan[groups.data_rank]
    ]

    def gather(logits: torch.Tensor, microbatch: Microbatch) -> torch.Tensor:
        parts = [torch.empty_like(logits) for _ in range(groups.layout.tensor_size)]
        torch.distributed.all_gather(parts, logits.contiguous(), group=groups.tensor)
        return torch.cat(parts, dim=1)[: microbatch.input_ids.numel(), : actor.shape.vocab_size]

    found = actor.pipeline.forward(microbatches, gather, all_rows=True)
    by_ids = {}
    for microbatch, logits in zip(microbatches, found, strict=False):
        ids = microbatch.input_ids[0].tolist()
        index = next(i for i, sequence in enumerate(sequences) if ids[: len(sequence)] == sequence)
        by_ids[index] = logits[: len(sequences[index])].clone()
    return by_ids


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=Path, nargs="+")
    parser.add_argument("--sequences", type=Path)
    parser.add_argument("--out", type=Path, help="folder, for a file of each replica's sequences")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--sp", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parallel = ParallelConfig(
        tensor_model_parallel_size=arguments.tp,
        pipeline_model_parallel_size=arguments.pp,
        expert_model_parallel_size=arguments.ep,
        sequence_parallel=arguments.sp,
    )
    groups = initialize(parallel, seed=1)
    sequences = torch.load(arguments.sequences)
    results = {str(model): whole_logits(build_actor(model, parallel, groups), sequences) for model in arguments.models}
    if groups.reports_losses:
        torch.save(results, arguments.out / f"{groups.data_rank}.pt")
    shutdown()


if __name__ == "__main__":
    main()
