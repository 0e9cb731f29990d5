"""One rank of a GSM8K run that ends by writing down the trained actor's logits, to compare hf-final with."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from xrl.parallel.cpu import prepare_megatron_for_cpu

prepare_megatron_for_cpu()

from tests.distributed.logits_worker import whole_logits  # noqa: E402
from xrl.config.parse import parse_settings  # noqa: E402
from xrl.session import Session  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--sequences", type=Path)
    arguments, flags = parser.parse_known_args()
    settings = parse_settings(flags)
    with Session(settings) as session:
        session.trainer().train()
        logits = whole_logits(session.actor, torch.load(arguments.sequences))
        if session.groups.reports_losses and session.groups.data_rank == 0:
            torch.save(logits, arguments.out)


if __name__ == "__main__":
    main()
