"""One rank of the state test: trains or loads, saves, and makes one more update, at whatever layout it is started with.

Rank 0 writes the loss of that update to --out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from tests.distributed.parity_worker import make_actor, make_samples
from xrl.actor.state import ActorState
from xrl.algorithms.grpo import GRPO
from xrl.checkpoint.choose import SavedState
from xrl.checkpoint.manifest import Manifest
from xrl.checkpoint.writer import LeadPart, Saved, StateWriter
from xrl.config import AlgorithmConfig, PackingConfig, ParallelConfig
from xrl.parallel.control import Control
from xrl.parallel.megatron import initialize, shutdown


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path)
    parser.add_argument("--vocab-size", type=int)
    parser.add_argument("--load", type=Path)
    parser.add_argument("--save", type=Path, help="folder of states")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--sp", action="store_true")
    parser.add_argument("--distributed-optimizer", action="store_true")
    arguments = parser.parse_args()
    arguments.recompute, arguments.backend, arguments.updates = None, "auto", 9
    torch.set_num_threads(1)
    parallel = ParallelConfig(
        tensor_model_parallel_size=arguments.tp,
        pipeline_model_parallel_size=arguments.pp,
        expert_model_parallel_size=arguments.ep,
        sequence_parallel=arguments.sp,
    )
    groups = initialize(parallel, seed=1)
    actor = make_actor(arguments, groups, PackingConfig(max_tokens_per_microbatch=400), linear=False)
    algorithm = GRPO(AlgorithmConfig(old_logprobs="rollout"))
    samples = make_samples(arguments.vocab_size)
    state = ActorState(actor)
    if arguments.load is None:
        for _ in range(2):
            actor.learn(samples, algorithm)
    else:
        state.load(SavedState.at(arguments.load))
    save(state, arguments.save, Control.of(groups))
    (report,) = actor.learn(samples, algorithm)
    if groups.rank == 0:
        arguments.out.write_text(json.dumps({"loss": report.metrics["loss"].value, "grad_norm": report.grad_norm}))
    shutdown()


def save(state: ActorState, folder: Path, control: Control) -> None:
    manifest = Manifest(
        step=1,
        num_updates=state.num_updates,
        cut=state.cut,
        files={},
        identity={},
        circumstances={},
        settings={},
        schedule=state.schedule(),
        parts={},
    )
    writer = StateWriter(folder, control, file_name=state.file_name, keep=1)
    lead = LeadPart(manifest=manifest, arrays={}) if control.leads else None
    assert writer.begin(1, state.pieces(), lead) is None
    result = writer.settle(wait=True)
    assert isinstance(result, Saved) == control.leads, result


if __name__ == "__main__":
    main()
