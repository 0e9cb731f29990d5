"""A worker and what is asked of it by runs, strangers, web pages, and those who make mistakes."""

from __future__ import annotations

import dataclasses
import http.client
import json
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.rollout.scripted_engine import ANSWER, FAIL, HANG, ScriptedEngine
from tests.rollout.served import Served, served
from xrl.rollout import protocol
from xrl.rollout.engine import check_request
from xrl.types import Completion, FinishReason, GenerateRequest, WeightBucket
from xrl.weights.checksum import bucket_checksum
from xrl.weights.transport import Manifest
from xrl.weights.transport.shared_memory import Sender

CALLS = (
    ("POST", protocol.GENERATE),
    ("POST", protocol.ABORT),
    ("POST", protocol.SLEEP),
    ("POST", protocol.WAKE),
    ("POST", protocol.CONNECT),
    ("POST", protocol.LOAD_PART),
    ("POST", protocol.FINISH_UPDATE),
    ("POST", protocol.SHUTDOWN),
    *((method, protocol.LEASE) for method in ("GET", "POST", "DELETE")),
    ("GET", "/"),
    ("POST", "/no/such/path"),
)
TIMEOUT_S = 60.0
GOOD = {"input_ids": [ANSWER, 5], "n": 2, "max_tokens": 4}


class CheckingEngine(ScriptedEngine):
    """Refuses what every engine refuses."""

    def submit(self, request: GenerateRequest) -> Any:
        check_request(request, vocab_size=10_000, max_model_len=64)
        return super().submit(request)


@pytest.fixture
def worker() -> Iterator[Served]:
    with served(CheckingEngine()) as found:
        assert update(found, 3)[0] == 200
        yield found


def update(worker: Served, version: int, *, value: float = 1.0, run_id: str | None = None) -> tuple[int, Any]:
    """What the worker answers to the last call of a whole update, or to the first that it refuses."""
    sender = Sender()
    bucket = WeightBucket(version=version, part="layers.0", tensors={"w": torch.full((3,), value)})
    where = sender.put(bucket)
    manifest = Manifest.of(bucket, where=where, checksum=bucket_checksum(bucket.tensors))
    for path, body in (
        (protocol.CONNECT, {"transport": "shared_memory", "invitation": {}, "timeout_s": 5}),
        (protocol.LOAD_PART, manifest.to_json()),
        (protocol.FINISH_UPDATE, {"version": version}),
    ):
        status, answer = worker.call(path, body, run_id=run_id)
        if status != 200:
            break
    sender.close()
    return status, answer


def generate(worker: Served, **changes: object) -> tuple[int, Any]:
    return worker.call(protocol.GENERATE, GOOD | changes)


def test_of_a_thousand_calls_without_the_key_none_is_served(worker: Served) -> None:
    shown = ("", "Bearer", "Bearer " + "0" * 64, worker.access.key, f"Basic {worker.access.key}", "Bearer \xe9")
    for place in range(1000):
        method, path = CALLS[place % len(CALLS)]
        headers = {**worker.access.headers, "Authorization": shown[place % len(shown)]}
        status, answer = worker.call(path, GOOD, method=method, headers=headers)
        assert (status, answer["type"]) == (403, "AccessDenied")
    assert generate(worker)[0] == 200  # nobody has shut it down
    assert worker.call(protocol.HEALTH, b"", method="GET", headers={})[0] == 200


@pytest.mark.parametrize("has_key", [True, False])
def test_web_page_is_served_nothing(worker: Served, has_key: bool) -> None:
    headers = {"Origin": "http://evil.example"} | (dict(worker.access.headers) if has_key else {})
    for method, path in (("POST", protocol.SHUTDOWN), ("GET", protocol.HEALTH)):
        assert worker.call(path, method=method, headers=headers)[0] == 403


def test_health_is_told_to_strangers_under_an_address_and_to_friends_under_any_name(worker: Served) -> None:
    for host, status in (("127.0.0.1:80", 200), ("[::1]:7", 200), ("localhost", 200), ("evil.example:80", 403)):
        assert worker.call(protocol.HEALTH, method="GET", headers={"Host": host})[0] == status
    friend = {**worker.access.headers, "Host": "evil.example"}
    assert worker.call(protocol.HEALTH, method="GET", headers=friend)[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/json; charset=klingon"},
        {"Content-Encoding": "deflate", "Content-Type": "application/json"},
    ],
)
def test_body_that_is_no_json_or_is_packed_is_not_read(worker: Served, headers: dict[str, str]) -> None:
    bomb = zlib.compress(b" " * 2**24, 9)
    status, answer = worker.call(protocol.GENERATE, bomb, headers={**worker.access.headers, **headers})
    assert (status, answer["type"]) == (415, "UnknownContent")


def test_answer_comes_as_arrays_to_those_who_ask_for_them_alone(worker: Served) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", worker.port, timeout=TIMEOUT_S)
    for asked in ({}, {"as_arrays": False}, {"as_arrays": "yes"}, {"as_arrays": True}, {"as_arrays": True, "n": 1}):
        connection.request("POST", protocol.GENERATE, json.dumps(GOOD | asked), dict(worker.access.headers))
        answer = connection.getresponse()
        body, content_type = answer.read(), answer.getheader("Content-Type", "")
        if asked.get("as_arrays") is True:
            assert content_type == protocol.ARRAYS
            (length,) = struct.unpack_from("<I", body)
            header, num_samples = json.loads(body[4 : 4 + length]), asked.get("n", 2)
            assert [meta["weights_version"] for meta in header] == [3] * num_samples
            tokens = struct.unpack_from(f"<{2 * num_samples}i{2 * num_samples}f", body, 4 + length)
            assert tokens == (*(ANSWER, 5) * num_samples, *[-3.0] * 2 * num_samples)
        else:
            assert content_type.startswith("application/json")
            assert json.loads(body)[0]["meta_info"]["output_token_logprobs"] == [[-3.0, ANSWER], [-3.0, 5]]
    connection.close()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"token_ids": [5, 6]}, "the engine's token_ids are list, not a numpy array of int32"),
        ({"token_ids": np.array([5, 6])}, "the engine's token_ids are int64, not a numpy array of int32"),
        ({"logprobs": np.zeros(2)}, "the engine's logprobs are float64, not a numpy array of float32"),
        ({"logprobs": np.zeros(3, np.float32)}, "the engine's token_ids and logprobs are [2] and [3], not one of"),
    ],
)
def test_answer_of_an_engine_that_is_no_arrays_is_the_engines_fault(change: dict[str, Any], words: str) -> None:
    class OddEngine(CheckingEngine):
        def _answers(self, request: GenerateRequest, reason: FinishReason) -> list[Completion]:
            return [dataclasses.replace(each, **change) for each in super()._answers(request, reason)]

    with served(OddEngine()) as worker:
        assert update(worker, 3)[0] == 200
        for asked in ({}, {"as_arrays": True}):
            status, answer = generate(worker, **asked)
            assert (status, answer["type"]) == (500, "EngineError") and words in answer["error"]


def test_second_run_is_refused_and_the_first_loses_nothing(worker: Served) -> None:
    for path, body in ((protocol.GENERATE, GOOD), (protocol.CONNECT, {}), (protocol.SHUTDOWN, {})):
        status, answer = worker.call(path, body, run_id="another")
        assert (status, answer["type"]) == (409, "WorkerInUse")
        assert answer["error"].startswith(f"in use by run {worker.access.run_id} since ")
    assert generate(worker)[0] == 200
    assert worker.call(protocol.LEASE, method="DELETE")[0] == 200
    assert update(worker, 0, run_id="another")[0] == 200
    assert generate(worker)[0] == 409


def test_answers_name_the_run_whose_weights_sampled_them(worker: Served) -> None:
    status, answers = generate(worker)
    assert status == 200
    assert {answer["meta_info"]["weights_run"] for answer in answers} == {worker.access.run_id}
    worker.call(protocol.LEASE, method="DELETE")
    assert worker.call(protocol.LEASE, run_id="another")[0] == 200
    _, answers = worker.call(protocol.GENERATE, GOOD, run_id="another")
    # The same version as this run's own, but it has loaded none yet.
    assert {answer["meta_info"]["weights_run"] for answer in answers} == {worker.access.run_id}
    assert update(worker, 3, value=2.0, run_id="another")[1] == {"weights_version": 3, "weights_run": "another"}
    _, answers = worker.call(protocol.GENERATE, GOOD, run_id="another")
    found = [answer["meta_info"] for answer in answers]
    assert {(meta["weights_run"], meta["weights_version"]) for meta in found} == {("another", 3)}
    assert {meta["output_token_logprobs"][0][0] for meta in found} == {-6.0}


def test_call_without_a_run_is_refused(worker: Served) -> None:
    for run_id in ("", "a b", "x" * 129):
        assert worker.call(protocol.WAKE, run_id=run_id)[0] == 400


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n": 0}, "n must be"),
        ({"n": 2_000_000}, "n must be"),
        ({"n": 16 * 16 + 1}, "n must be"),
        ({"n": True}, "n must be"),
        ({"n": 1.0}, "n must be"),
        ({"first_sample": -1}, "first_sample must be"),
        ({"first_sample": 2**31}, "first_sample must be"),
        ({"first_sample": 2**31 - 1}, "ordinals in"),
        ({"num_drawn": -1}, "num_drawn must be"),
        ({"num_drawn": 64}, "num_drawn must be"),
        ({"num_drawn": 2}, "num_drawn must be"),
        ({"seed": 2**63}, "seed must be"),
        ({"seed": "5"}, "seed must be"),
        ({"top_k": 2**64}, "top_k must be"),
        ({"top_k": -1}, "top_k must be"),
        ({"top_p": 1.5}, "top_p must be"),
        ({"top_p": 0}, "top_p"),
        ({"temperature": 1e308}, "temperature must be"),
        ({"temperature": 1e-300}, "temperature must be"),
        ({"temperature": None}, "temperature must be"),
        ({"max_tokens": 2**70}, "max_tokens must be"),
        ({"max_tokens": 63}, "max_model_len"),
        ({"stop_token_ids": [2**70]}, "stop_token_ids must"),
        ({"stop_token_ids": [1] * 1025}, "stop_token_ids must"),
        ({"stop_token_ids": {"a": 1}}, "stop_token_ids must"),
        ({"request_id": "x" * 201}, "request_id must be"),
        ({"request_id": "a\x1b[2J"}, "request_id must be"),
        ({"request_id": 5}, "request_id must be"),
        ({"input_ids": []}, "at least one token"),
        ({"input_ids": [1] * 65}, "input_ids must be"),
        ({"input_ids": [10_000]}, "token ids must be in"),
        ({"input_ids": [True]}, "input_ids must hold"),
        ({"input_ids": [[1]]}, "input_ids must hold"),
        ({"input_ids": "x"}, "input_ids must be"),
    ],
)
def test_request_that_cannot_run_is_the_callers_fault_and_named(
    worker: Served, change: dict[str, object], named: str
) -> None:
    status, answer = generate(worker, **change)
    assert status == 400 and named in answer["error"] and set(answer) == {"error", "type"}
    assert answer["error"].isprintable() and len(answer["error"]) <= 500


@pytest.mark.parametrize(
    "body",
    [b"", b"null", b"[]", b"{", b"[" * 50_000, b'{"a":' * 10_000, b"\xff\xfe{}", b'{"n": NaN}', b"1" * 9000, b"{}{}"],
    ids=range(10),
)
def test_body_that_is_no_object_is_the_callers_fault(worker: Served, body: bytes) -> None:
    for path in (protocol.GENERATE, protocol.CONNECT, protocol.LOAD_PART, protocol.FINISH_UPDATE, protocol.ABORT):
        status, answer = worker.call(path, body)
        assert (status, answer["type"]) == (400, "ValueError")


def test_body_larger_than_its_call_needs_is_refused(worker: Served) -> None:
    status, answer = worker.call(protocol.GENERATE, b" " * (2**16 + 64 * 24 + 1))
    assert (status, answer["type"]) == (413, "TooLarge")


@pytest.mark.parametrize(
    "body",
    [
        {"transport": "os", "invitation": {}, "timeout_s": 1},
        {"transport": "shared_memory", "invitation": [], "timeout_s": 1},
        {"transport": "shared_memory", "invitation": {}, "timeout_s": 3601},
        {"transport": "shared_memory", "invitation": {}, "timeout_s": -1},
        {"transport": "broadcast", "invitation": {"host": "127.0.0.1", "port": "x"}, "timeout_s": 1},
    ],
)
def test_refused_connect_costs_the_present_trainer_nothing(worker: Served, body: dict[str, object]) -> None:
    sender = Sender()
    assert worker.call(protocol.CONNECT, {"transport": "shared_memory", "invitation": {}, "timeout_s": 5})[0] == 200
    assert worker.call(protocol.CONNECT, body)[0] == 400
    bucket = WeightBucket(version=4, part="layers.0", tensors={"w": torch.ones(3)})
    manifest = Manifest.of(bucket, where=sender.put(bucket), checksum=bucket_checksum(bucket.tensors))
    assert worker.call(protocol.LOAD_PART, manifest.to_json())[0] == 200
    sender.close()


def test_layer_whose_bytes_are_not_there_is_told_from_one_that_cannot_be(worker: Served) -> None:
    sender = Sender()
    bucket = WeightBucket(version=4, part="layers.0", tensors={"w": torch.ones(3)})
    data = Manifest.of(bucket, where=sender.put(bucket), checksum=bucket_checksum(bucket.tensors)).to_json()
    gone = data | {"where": data["where"] | {"descriptor": 10**6}}
    assert worker.call(protocol.LOAD_PART, gone)[1]["type"] == "TransportError"
    for where in ({"offsets": [2**60]}, {"num_bytes": 2**60}, {"inode": 0}, {"pid": "1/../.."}, {"offsets": []}):
        status, answer = worker.call(protocol.LOAD_PART, data | {"where": data["where"] | where})
        assert (status, answer["type"]) == (400, "ValueError")
    assert worker.call(protocol.LOAD_PART, data)[0] == 200
    sender.close()


def test_engines_failure_is_its_own_and_one_request_s(worker: Served) -> None:
    status, answer = generate(worker, input_ids=[FAIL, 1])
    assert (status, answer["type"]) == (500, "EngineError")
    assert generate(worker)[0] == 200


def test_request_whose_caller_hangs_up_ends(worker: Served) -> None:
    connection = socket.create_connection(("127.0.0.1", worker.port), timeout=TIMEOUT_S)
    body = json.dumps(GOOD | {"input_ids": [HANG, 1]}).encode()
    head = "".join(f"{name}: {value}\r\n" for name, value in worker.access.headers.items())
    connection.sendall(
        f"POST /generate HTTP/1.1\r\nHost: x\r\n{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    )
    while worker.call(protocol.HEALTH, method="GET")[1]["num_running"] == 0:
        time.sleep(0.01)
    connection.close()
    while worker.call(protocol.HEALTH, method="GET")[1]["num_running"]:
        time.sleep(0.01)
