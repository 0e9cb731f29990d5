"""Whom a worker lets in; `test_calls.py` has the same over HTTP."""

from __future__ import annotations

import pytest
from aiohttp.test_utils import make_mocked_request

from xrl.rollout import protocol
from xrl.rollout.access import Access, AccessDenied, WorkerInUse
from xrl.rollout.gate import Gate, UnknownContent

ACCESS = Access(key="k" * 40, run_id="first")


def gate(host: str = "10.0.0.2") -> tuple[Gate, list[str]]:
    taken: list[str] = []
    return Gate(ACCESS.key, host=host, taken_over=lambda: taken.append("taken")), taken


def admit(found: Gate, path: str = protocol.GENERATE, *, method: str = "POST", **headers: str) -> bool:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return found.admit(make_mocked_request(method, path, headers={"Content-Length": "2", **ACCESS.headers, **given}))


def test_run_takes_the_worker_with_its_first_call_and_not_by_asking() -> None:
    found, taken = gate()
    admit(found, protocol.LEASE, method="GET", X_XRL_Run="curious")
    admit(found, protocol.HEALTH, method="GET")
    assert found.lease.run_id is None and not taken
    assert admit(found) and admit(found)
    assert found.lease.run_id == "first" and taken == ["taken"]
    with pytest.raises(WorkerInUse):
        admit(found, X_XRL_Run="second")


@pytest.mark.parametrize(
    "shown", ["", "Bearer", "Bearer ", f"Basic {ACCESS.key}", ACCESS.key, f"Bearer {ACCESS.key}x", "Bearer ü"]
)
def test_stranger_gets_health_alone(shown: str) -> None:
    found, _ = gate()
    with pytest.raises(AccessDenied, match="key is missing or wrong"):
        admit(found, Authorization=shown)
    with pytest.raises(AccessDenied):
        admit(found, protocol.HEALTH, Authorization=shown)  # a POST
    assert not admit(found, protocol.HEALTH, method="GET", Authorization=shown, Host="10.0.0.2:7000")


@pytest.mark.parametrize(
    ("host", "is_ours"),
    [
        ("127.0.0.1:7000", True),
        ("192.168.7.7", True),
        ("[::1]:7000", True),
        ("LOCALHOST:7000", True),
        ("worker-0.cluster:7000", True),
        ("evil.example", False),
        ("127.0.0.1.evil.example:7000", False),
        ("evil.example:127", False),
        ("", False),
    ],
)
def test_stranger_must_have_come_by_an_address_or_by_our_own_name(host: str, is_ours: bool) -> None:
    found, _ = gate("worker-0.cluster")
    if is_ours:
        admit(found, protocol.HEALTH, method="GET", Authorization="", Host=host)
        return
    with pytest.raises(AccessDenied):
        admit(found, protocol.HEALTH, method="GET", Authorization="", Host=host)
    assert admit(found, protocol.HEALTH, method="GET", Host=host)  # with the key, by any name


@pytest.mark.parametrize(
    ("headers", "is_read"),
    [
        ({}, True),
        ({"Content_Type": "application/json"}, True),
        ({"Content_Type": "application/json; charset=UTF-8"}, True),
        ({"Content_Type": "application/json; charset=utf-16"}, False),
        ({"Content_Type": "text/plain"}, False),
        ({"Content_Type": "application/x-www-form-urlencoded"}, False),
        ({"Content_Encoding": "gzip"}, False),
        ({"Content_Encoding": "gzip", "Content_Length": "0"}, True),
    ],
    ids=str,
)
def test_only_plain_json_is_read(headers: dict[str, str], is_read: bool) -> None:
    found, _ = gate()
    if is_read:
        assert admit(found, **headers)
    else:
        with pytest.raises(UnknownContent):
            admit(found, **headers)
