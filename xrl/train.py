"""Entry of torchrun: parse -> check -> build -> loop.

    torchrun --nproc-per-node 4 -m xrl.train --config configs/X.yaml --tensor-model-parallel-size 2

`python -m xrl.train` alone is one rank.
"""

from __future__ import annotations

if __name__ == "__main__":  # `python -m` put the current folder first: before anything is imported from there
    from xrl.launch.import_path import leave_current_folder

    leave_current_folder()

    from xrl.launch.hearing import block_signals

    block_signals()  # they wait for somebody who hears them

import logging
import os
import sys
from collections.abc import Sequence

from xrl.config import Settings
from xrl.config.parse import parse_settings
from xrl.launch.address import meet_at_loopback
from xrl.launch.exit import agents_file, announce_errors, is_rank_of_torchrun, run_main
from xrl.launch.hearing import RUN_SIGNALS, Hearing, Reaction, hearing, uninterrupted
from xrl.launch.start import prepare_process, without_collections
from xrl.launch.stop import CauseFile, RunSignals, StopRequest
from xrl.launch.terminal import say
from xrl.launch.variables import rank_number
from xrl.preflight import preflight

logger = logging.getLogger("xrl")


def main(argv: Sequence[str] | None = None, stop: StopRequest | None = None) -> None:
    """Train as the command line says, until it is done or `stop` is asked."""
    settings = parse_settings(argv)
    for name in ("LOCAL_RANK", "MASTER_PORT"):  # of which torch would make an error of its own
        rank_number(os.environ, name, 0)
    # `xrl train` above us has tried the prompts already; under plain torchrun one rank does it for all.
    is_first = agents_file() is None and rank_number(os.environ, "RANK", 0) == 0
    preflight(settings, world_size=rank_number(os.environ, "WORLD_SIZE", 1), tries_out=is_first)
    meet_at_loopback(os.environ)
    train(settings, stop)


def train(settings: Settings, stop: StopRequest | None = None) -> None:
    """Build this rank's part of the run, then train."""
    # Imported here: `--help` and bad settings are answered without waiting for torch.
    with without_collections(), uninterrupted():
        from xrl.metrics.console import setup_logging
        from xrl.metrics.ending import Ending
        from xrl.session import Session

    setup_logging(rank=rank_number(os.environ, "RANK", 0))
    ending = Ending()
    with Session(settings, ending=ending, stop=stop) as session, announce_errors(ending.words_about, stop):
        if session.is_done:
            logger.info("nothing is left to do: all %d rollouts are learned from", session.num_steps)
        else:
            session.trainer().train()


def _run_as_rank(arguments: Sequence[str]) -> None:
    """Run as one rank of torchrun, or alone."""
    stop, file = StopRequest(), agents_file()
    launcher = os.getppid() if is_rank_of_torchrun() else None
    causes = None if file is None else CauseFile(file.parent)

    def reaction(heard: Hearing) -> Reaction:
        return RunSignals(stop, heard.end, launcher=launcher, causes=causes, say=say).hear

    with hearing(RUN_SIGNALS, reaction) as heard:
        run_main(lambda: main(arguments, stop), heard)


if __name__ == "__main__":
    prepare_process()
    _run_as_rank(sys.argv[1:])
