"""Entry of torchrun: parse -> check -> build -> loop.

    torchrun --nproc-per-node 4 -m xrl.train --config configs/X.yaml --tensor-model-parallel-size 2

`python -m xrl.train` alone is one rank.
"""

from __future__ import annotations

if __name__ == "__main__":  # `python -m` put the current folder first: before anything is imported from there
    from xrl.launch.import_path import leave_current_folder

    leave_current_folder()

import contextlib
import gc
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from xrl.config import Settings
from xrl.config.parse import parse_settings
from xrl.launch.address import meet_at_loopback
from xrl.launch.exit import agents_file, announce_errors, run_main
from xrl.launch.start import prepare_process, without_collections
from xrl.launch.variables import rank_number
from xrl.preflight import preflight

if TYPE_CHECKING:
    from xrl.launch.progress import Progress
    from xrl.metrics.ending import Ending
    from xrl.parallel.groups import ParallelGroups
    from xrl.parallel.watch import Watch

# Beyond the longest wait of rank 0 that its settings bound: what it does itself meanwhile.
LEAD_GRACE_S = 600.0


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    settings = parse_settings(argv)
    for name in ("LOCAL_RANK", "MASTER_PORT"):  # of which torch would make an error of its own
        rank_number(os.environ, name, 0)
    # `xrl train` above us has tried the prompts already; under plain torchrun one rank does it for all.
    is_first = agents_file() is None and rank_number(os.environ, "RANK", 0) == 0
    preflight(settings, world_size=rank_number(os.environ, "WORLD_SIZE", 1), tries_prompts=is_first)
    meet_at_loopback(os.environ)
    train(settings)


def train(settings: Settings) -> None:
    """Build this rank's part of the run, then train."""
    # Imported here: `--help` and bad settings are answered without waiting for torch.
    with without_collections():
        from xrl.parallel.cpu import prepare_megatron_for_cpu

        prepare_megatron_for_cpu()
        import torch

        from xrl.actor.actor import Actor
        from xrl.algorithms import create_algorithm
        from xrl.assembly import build_lead, share_rollout_count
        from xrl.kernels.threads import use_threads
        from xrl.launch.progress import Progress
        from xrl.metrics.console import setup_logging
        from xrl.metrics.ending import Ending
        from xrl.parallel.megatron import initialize, shutdown
        from xrl.trainer import Trainer

    setup_logging(rank=rank_number(os.environ, "RANK", 0))
    ending, progress = Ending(), Progress()
    with contextlib.ExitStack() as stack, announce_errors(ending.words_about):
        groups = initialize(settings.parallel, seed=settings.run.seed)
        stack.callback(shutdown)
        if groups.layout.world_size > 1:
            stack.callback(watch_ranks(settings, groups, progress, ending).close)
        lead = build_lead(settings, groups, stack, ending, progress) if groups.rank == 0 else None
        num_rollouts = share_rollout_count(lead, groups)
        ending.expect(num_rollouts)
        algorithm = create_algorithm(settings.algorithm)
        actor = Actor(
            model=settings.model,
            parallel=settings.parallel,
            optimizer=settings.optimizer,
            packing=settings.data.packing,
            groups=groups,
            num_updates=num_rollouts * algorithm.settings.updates_per_rollout,
            keeps_reference=bool(algorithm.settings.kl_coef),
            progress=progress,
        )
        trainer = Trainer(
            settings,
            groups,
            actor,
            algorithm,
            lead,
            num_rollouts=num_rollouts,
            progress=progress,
        )
        if groups.device.type == "cpu":
            use_threads(torch.get_num_threads(), num_parameters=actor.num_parameters)
        gc.collect()
        gc.freeze()  # modules and models stay: collections need not go through them again, many times a step
        trainer.train()


def watch_ranks(settings: Settings, groups: ParallelGroups, progress: Progress, ending: Ending) -> Watch:
    """From here on a rank that is stopped or hangs ends the run, and is named."""
    from xrl.launch.exit import RunEnded, end_process
    from xrl.parallel.watch import Watch, connect_to_store

    def end(sentence: str) -> None:
        error = RunEnded(sentence)
        end_process(error, ending.words_about(error))

    return Watch(
        lambda: connect_to_store(os.environ),
        progress,
        rank=groups.rank,
        world_size=groups.layout.world_size,
        lead_limit_s=settings.longest_wait_s + LEAD_GRACE_S,
        end=end,
    )


if __name__ == "__main__":
    prepare_process()
    run_main(lambda: main(sys.argv[1:]))
