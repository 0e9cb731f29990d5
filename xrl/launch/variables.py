"""Environment variables with which a launcher tells a process its place among the ranks."""

from __future__ import annotations

from collections.abc import MutableMapping

RANK_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_NAME",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
# TORCHELASTIC_: what torchrun tells its ranks besides. PET_: torchrun's own flags, as cluster managers set them.
RANK_PREFIXES = ("TORCHELASTIC_", "PET_")


def drop_rank_variables(environment: MutableMapping[str, str]) -> None:
    """Forget the launcher above: what is started with this environment is no rank of that launcher's world."""
    for name in list(environment):
        if name in RANK_VARIABLES or name.startswith(RANK_PREFIXES):
            del environment[name]
