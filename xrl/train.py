"""Entry of torchrun: parse -> check -> build -> loop.

    torchrun --nproc-per-node 4 -m xrl.train --config configs/X.yaml --tensor-model-parallel-size 2

`python -m xrl.train` alone is one rank.
"""

from __future__ import annotations

if __name__ == "__main__":  # `python -m` put the current folder first: before anything is imported from there
    from xrl.launch.import_path import leave_current_folder

    leave_current_folder()

import os
import sys
from collections.abc import Sequence

from xrl.config import Settings
from xrl.config.parse import parse_settings
from xrl.launch.address import meet_at_loopback
from xrl.launch.exit import agents_file, announce_errors, run_main
from xrl.launch.start import prepare_process, without_collections
from xrl.launch.variables import rank_number
from xrl.preflight import preflight


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    settings = parse_settings(argv)
    for name in ("LOCAL_RANK", "MASTER_PORT"):  # of which torch would make an error of its own
        rank_number(os.environ, name, 0)
    # `xrl train` above us has tried the prompts already; under plain torchrun one rank does it for all.
    is_first = agents_file() is None and rank_number(os.environ, "RANK", 0) == 0
    preflight(settings, world_size=rank_number(os.environ, "WORLD_SIZE", 1), tries_out=is_first)
    meet_at_loopback(os.environ)
    train(settings)


def train(settings: Settings) -> None:
    """Build this rank's part of the run, then train."""
    # Imported here: `--help` and bad settings are answered without waiting for torch.
    with without_collections():
        from xrl.metrics.console import setup_logging
        from xrl.metrics.ending import Ending
        from xrl.session import Session

    setup_logging(rank=rank_number(os.environ, "RANK", 0))
    ending = Ending()
    with Session(settings, ending=ending) as session, announce_errors(ending.words_about):
        session.trainer().train()


if __name__ == "__main__":
    prepare_process()
    run_main(lambda: main(sys.argv[1:]))
