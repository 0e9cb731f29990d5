"""The store where the ranks met, for those who need a client of their own, with keys of their own."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist

from xrl.launch.variables import rank_number
from xrl.launch.watch import Store

ATTEMPT_VARIABLE = "TORCHELASTIC_RESTART_COUNT"
STORE_TIMEOUT = timedelta(seconds=30)


def connect_to_store(environment: Mapping[str, str], *, timeout: timedelta = STORE_TIMEOUT) -> Store:
    """A client of the store where the ranks of this environment met.

    Raises:
        RuntimeError: it does not answer.
    """
    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, timeout=timeout)  # type: ignore[attr-defined]
    # torchrun keeps its store when it starts the ranks again: what the last ones said is not news.
    return dist.PrefixStore(f"attempt_{attempt_number(environment)}", store)  # type: ignore[attr-defined]


def attempt_number(environment: Mapping[str, str]) -> int:
    """How often torchrun has started the ranks before."""
    return rank_number(environment, ATTEMPT_VARIABLE, 0)
