"""One rank of the drift test: train with learning rate 0, so that engine and actor must agree for ever.

Rank 0 writes the mean |rollout - actor log-prob| of every rollout to --out, by temperature.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from xrl.parallel.cpu import prepare_megatron_for_cpu

prepare_megatron_for_cpu()

from xrl.config import Settings  # noqa: E402
from xrl.config.parse import parse_settings  # noqa: E402
from xrl.metrics.sinks import read_rows  # noqa: E402
from xrl.parallel.groups import ParallelGroups  # noqa: E402
from xrl.parallel.megatron import initialize, shutdown  # noqa: E402
from xrl.session import Session  # noqa: E402


def run(settings: Settings, groups: ParallelGroups) -> list[float]:
    """The mismatch of each rollout; on rank 0, empty on the others."""
    with Session(settings, groups=groups) as session:
        session.trainer().train()
        if session.folder is None:
            return []
        return [row["mismatch"] for row in read_rows(session.folder.metrics) if "mismatch" in row]


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
