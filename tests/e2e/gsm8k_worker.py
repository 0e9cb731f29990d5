"""One rank of a GSM8K run that ends by writing down the trained actor's logits, to compare hf-final with."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

import torch

from xrl.parallel.cpu import prepare_megatron_for_cpu

prepare_megatron_for_cpu()

from tests.distributed.logits_worker import whole_logits  # noqa: E402
from xrl.actor.actor import Actor  # noqa: E402
from xrl.algorithms import create_algorithm  # noqa: E402
from xrl.assembly import build_lead, share_rollout_count  # noqa: E402
from xrl.config.parse import parse_settings  # noqa: E402
from xrl.parallel.megatron import initialize, shutdown  # noqa: E402
from xrl.trainer import Trainer  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sequences", type=Path)
    arguments, flags = parser.parse_known_args()
    settings = parse_settings(flags)
    groups = initialize(settings.parallel, seed=settings.run.seed)
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
    logits = whole_logits(actor, torch.load(arguments.sequences))
    if groups.reports_losses and groups.data_rank == 0:
        torch.save(logits, arguments.out)
    shutdown()


if __name__ == "__main__":
    main()
