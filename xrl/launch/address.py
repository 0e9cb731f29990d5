"""Where the ranks of one host meet: by an address that needs no name."""

from __future__ import annotations

import socket
from collections.abc import Mapping, MutableMapping

from xrl.config.errors import SettingsError

LOOPBACK = "127.0.0.1"


def on_one_host(environment: Mapping[str, str]) -> bool:
    """Whether every rank of the world that this environment describes is on this host; a world of one is."""
    world_size = environment.get("WORLD_SIZE", "1")
    return environment.get("LOCAL_WORLD_SIZE", "1" if world_size == "1" else "") == world_size


def meet_at_loopback(environment: MutableMapping[str, str]) -> None:
    """Let ranks that are all on this host meet at its loopback address.

    torchrun tells them the host's name, which may be known to nobody, or lead elsewhere: torch would try for minutes
    without a word. What listens there listens on every address of the host.

    Raises:
        SettingsError: there is no telling that they are all here, and the name leads nowhere.
    """
    name = environment.get("MASTER_ADDR")
    if name is None:
        return
    if on_one_host(environment):
        environment["MASTER_ADDR"] = LOOPBACK
        return
    try:
        socket.getaddrinfo(name, None)
    except (OSError, UnicodeError) as error:
        raise SettingsError(
            f"MASTER_ADDR is {name}, which this host knows no address of: set it to an address of the host of rank 0"
        ) from error
