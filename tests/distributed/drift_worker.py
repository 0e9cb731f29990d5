"""One rank of the drift test: train with learning rate 0, so that engine and actor must agree for ever.

Rank 0 writes the mean |rollout - actor log-prob| of every rollout to --out, by temperature.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path

from xrl.parallel.cpu import prepare_megatron_for_cpu

prepare_megatron_for_cpu()

from xrl.actor.actor import Actor  # noqa: E402
from xrl.algorithms import create_algorithm  # noqa: E402
from xrl.assembly import build_lead, share_rollout_count  # noqa: E402
from xrl.config import Settings  # noqa: E402
from xrl.config.parse import parse_settings  # noqa: E402
from xrl.metrics.sinks import read_rows  # noqa: E402
from xrl.parallel.groups import ParallelGroups  # noqa: E402
from xrl.parallel.megatron import initialize, shutdown  # noqa: E402
from xrl.trainer import Trainer  # noqa: E402


def run(settings: Settings, groups: ParallelGroups) -> list[float]:
    """The mismatch of each rollout; on rank 0, empty on the others."""
    with contextlib.ExitStack() as stack:
        lead = build_lead(settings, groups, stack) if groups.rank == 0 else None
        num_rollouts = share_rollout_count(lead, groups)
        actor = Actor(
            model=settings.model,
            parallel=settings.parallel,
            optimizer=settings.optimizer,
            packing=settings.data.packing,
            groups=groups,
            num_updates=num_rollouts,
            keeps_reference=bool(settings.algorithm.kl_coef),
        )
        Trainer(settings, groups, actor, create_algorithm(settings.algorithm), lead, num_rollouts=num_rollouts).train()
        if lead is None:
            return []
        return [row["mismatch"] for row in read_rows(lead.journal.folder.metrics) if "mismatch" in row]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--temperatures", type=float, nargs="+")
    arguments, flags = parser.parse_known_args()
    groups = None
    mismatch = {}
    for temperature in arguments.temperatures:
        settings = parse_settings([*flags, f"--temperature={temperature}"])
        groups = groups or initialize(settings.parallel, seed=settings.run.seed)
        mismatch[str(temperature)] = run(settings, groups)
    if groups is not None and groups.rank == 0:
        arguments.out.write_text(json.dumps(mismatch))
    shutdown()


if __name__ == "__main__":
    main()
