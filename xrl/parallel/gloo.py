"""One event loop for all of a process's gloo groups."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from xrl.launch.address import LOOPBACK, on_one_host

INTERFACES = "GLOO_SOCKET_IFNAME"


@contextmanager
def one_event_loop() -> Iterator[None]:
    """Make all groups of this block share one gloo device.

    torch gives each group a device of its own, whose thread wakes up a hundred times a second whether anything comes or
    not. megatron-core makes some twenty groups: two thousand interruptions a second of the threads that compute.
    """
    if not dist.is_gloo_available():
        yield
        return
    original: Any = distributed_c10d.ProcessGroupGloo
    devices: list[Any] = []

    class SharingGloo(original):
        def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
            if not devices:
                devices.extend(_devices(original))
            options = original._Options()
            options._devices = devices
            options._threads = 2 * len(devices)
            options._timeout = timeout
            super().__init__(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = SharingGloo  # type: ignore[misc]
    try:
        yield
    finally:
        distributed_c10d.ProcessGroupGloo = original  # type: ignore[misc]


def _devices(gloo: Any) -> list[Any]:
    """As torch chooses them, but where all ranks are on this host, whose name may be known to nobody."""
    names = [name for name in os.environ.get(INTERFACES, "").split(",") if name]
    return [gloo.create_device(interface=name) for name in names] or [
        gloo.create_device(hostname=LOOPBACK) if on_one_host(os.environ) else gloo.create_default_device()
    ]
