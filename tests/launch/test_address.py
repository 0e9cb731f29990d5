"""Ranks of one host meet without its name."""

from __future__ import annotations

import pytest

from xrl.config import SettingsError
from xrl.launch.address import LOOPBACK, meet_at_loopback, on_one_host

NOWHERE = "nowhere.invalid"  # a name that is promised to lead to no address (RFC 6761)


def test_ranks_of_one_host_meet_at_its_loopback_address() -> None:
    environment = {"MASTER_ADDR": NOWHERE, "MASTER_PORT": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}
    meet_at_loopback(environment)
    assert environment["MASTER_ADDR"] == LOOPBACK
    assert environment["MASTER_PORT"] == "1"


def test_ranks_of_several_hosts_meet_where_they_were_told() -> None:
    environment = {"MASTER_ADDR": "10.0.0.5", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
    meet_at_loopback(environment)
    assert environment["MASTER_ADDR"] == "10.0.0.5"


def test_name_that_leads_nowhere_is_refused_where_it_is_needed() -> None:
    with pytest.raises(SettingsError, match=f"MASTER_ADDR is {NOWHERE}, which this host knows no address of"):
        meet_at_loopback({"MASTER_ADDR": NOWHERE, "WORLD_SIZE": "4"})
    with pytest.raises(SettingsError, match="knows no address"):
        meet_at_loopback({"MASTER_ADDR": "a" * 70, "WORLD_SIZE": "4"})


def test_a_world_of_one_needs_no_address() -> None:
    environment: dict[str, str] = {}
    meet_at_loopback(environment)
    assert environment == {} and on_one_host(environment)
