"""One rank of the resume test: `xrl train` in this process, which ends without a word behind a rollout."""

from __future__ import annotations

import argparse
import os

from xrl.parallel.cpu import prepare_megatron_for_cpu

prepare_megatron_for_cpu()

import torch  # noqa: E402

from xrl.config.parse import parse_settings  # noqa: E402
from xrl.session import Session  # noqa: E402
from xrl.trainer import Trainer  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--end-behind", type=int)
    arguments, flags = parser.parse_known_args()
    torch.set_num_threads(1)

    def end(trainer: Trainer, step: int) -> None:
        if step == arguments.end_behind:
            os._exit(0)  # as by SIGKILL: nothing is told, closed or written

    with Session(parse_settings(flags)) as session:
        if not session.is_done:
            session.trainer(hooks=[end]).train()


if __name__ == "__main__":
    main()
