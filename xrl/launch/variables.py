"""Environment variables with which a launcher tells a process its place among the ranks."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

from xrl.config.errors import SettingsError
from xrl.config.numbers import whole_number
from xrl.config.printable import shown

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


def rank_number(environment: Mapping[str, str], name: str, default: int) -> int:
    """The number that a launcher has put into one of its variables; `default` where there is none.

    Raises:
        SettingsError: it is no number.
    """
    if name not in environment:
        return default
    number = whole_number(environment[name])
    if number is None or number < 0:
        raise SettingsError(f"the variable {name} must be a whole number >= 0, found {shown(environment[name])}")
    return number
