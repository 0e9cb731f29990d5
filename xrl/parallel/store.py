"""The store where the ranks met, for those who need a client of their own."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist

from xrl.launch.watch import Store

STORE_TIMEOUT = timedelta(seconds=30)


def connect_to_store(environment: Mapping[str, str], *, timeout: timedelta = STORE_TIMEOUT) -> Store:
    """A client of the store where the ranks of this environment met.

    Raises:
        RuntimeError: it does not answer.
    """
    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    return dist.TCPStore(host, port, is_master=False, timeout=timeout)  # type: ignore[attr-defined]
