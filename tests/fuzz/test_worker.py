"""Malformed and hostile calls of a worker, with its key and without: it answers each, and everybody else as ever."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import psutil
import pytest

from tests.fuzz.conftest import Fuzz
from tests.rollout.engines import push
from tests.rollout.served import Served, served
from tests.tiny_models import make_checkpoint, make_model
from xrl.config.rollout import SAMPLES_PER_PLACE
from xrl.rollout import create_engine, protocol
from xrl.rollout.answers import checked_completions

TIMEOUT_S = 60.0
MAX_MODEL_LEN, MAX_BATCH_SIZE, VOCAB_SIZE = 48, 16, 98
GOOD = {"input_ids": [5, 6, 7], "n": 2, "max_tokens": 8, "temperature": 1.0, "seed": 17}
# Answers to what the caller got wrong, or to what others do at that moment.
BLAMELESS = {200, 400, 403, 404, 405, 408, 409, 413, 415, 417, 424, 503}
ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1.5, 2**31, 2**63, 2**64, -(2**70), 1e308, float("nan"), float("-inf"), 1e-320),
    *("5", "", "x" * 5000, "\x1b[2J", "\u202e", "²", "٣", [], {}, [1], {"a": 1}, [[[]]], [None], [True], [2**70]),
)
# An answer comes as JSON, and as arrays to those who ask for them.
FORMS: tuple[dict[str, Any], ...] = ({}, {"as_arrays": False}, {"as_arrays": True})
JSON = "application/json; charset=utf-8"
FIELDS = (
    *(*GOOD, "top_k", "top_p", "stop_token_ids", "request_id", "return_logprob", ""),
    *("as_arrays", "first_sample", "num_drawn"),
)
BODIES = (b"", b"null", b"[]", b"5", b"{", b"[" * 50_000, b'{"a":' * 50_000, b"\xff{}", b"\xed\xa0\x80", b"1" * 5000)
HEADERS = (
    *("Content-Type: text/plain", "Content-Type: application/json; charset=klingon", "Content-Encoding: gzip"),
    *("Transfer-Encoding: chunked", "Expect: 100-continue", "Expect: x", "X: " + "y" * 9000, "Content-Length: 5"),
    *("Upgrade: websocket\r\nConnection: Upgrade", "Origin: null", "X: \x1b[2J", "Connection: close", "Host: evil"),
)
NO_HTTP = (
    *(b"\0" * 50, b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\r\n\r\n"),
    b"POST /generate HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
    b"POST /generate HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
)
PATHS = ("/", "/generate/", "//generate", "/xrl/v1/../generate", "/%00", "/health?x=" + "y" * 2000, "/sleep?level=9")
CALLED = (protocol.GENERATE, protocol.ABORT, protocol.CONNECT, protocol.LOAD_PART, protocol.FINISH_UPDATE)
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "X" * 40)


class Answer(NamedTuple):
    """To one call; `status` 0 and nothing where there is none."""

    status: int
    content_type: str
    body: bytes


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    engine = create_engine(
        "embedded",
        model_dir=make_checkpoint(tmp_path_factory.mktemp("model")),
        dtype="float32",
        device="cpu",
        max_batch_size=MAX_BATCH_SIZE,
        num_threads=1,
        max_model_len=MAX_MODEL_LEN,
    )
    push(engine, make_model())
    with served(engine, max_batch_size=MAX_BATCH_SIZE, max_model_len=MAX_MODEL_LEN) as found:
        yield found
    engine.close()


def malformed(draw: random.Random, key: str) -> bytes:
    """One call's bytes."""
    kind = draw.randrange(6)
    if kind <= 1:
        body = asked(draw) | {draw.choice(FIELDS): draw.choice(ODD)}
        return http(protocol.GENERATE, json.dumps(body).encode(), key)
    if kind == 2:
        return http(draw.choice(CALLED), draw.choice(BODIES), key)
    if kind == 3:
        return http(draw.choice(CALLED), json.dumps(odd_body(draw)).encode(), key)
    if kind == 4:
        if draw.random() < 0.5:
            return http(draw.choice(PATHS), b"{}", key, method=draw.choice(METHODS))
        return http(protocol.GENERATE, json.dumps(asked(draw)).encode(), f"{key}{draw.choice(HEADERS)}\r\n")
    return draw.choice((*NO_HTTP, bytes(draw.randrange(256) for _ in range(200)) + b"\r\n\r\n"))


def asked(draw: random.Random) -> dict[str, Any]:
    """A good request, whose answer comes as JSON or as arrays."""
    return GOOD | draw.choice(FORMS)


def odd_body(draw: random.Random) -> dict[str, Any]:
    """A body of a call about weights, with one odd field."""
    entry = {"name": "x", "dtype": "float32", "shape": [2]}
    body = draw.choice(
        (
            {"version": 1, "part": "layers.0", "tensors": [entry], "checksum": "0", "where": {}},
            {"transport": "shared_memory", "invitation": {}, "timeout_s": 0.2},
            {"transport": "broadcast", "invitation": {"host": "127.0.0.1", "port": 9}, "timeout_s": 0.2},
            {"version": draw.choice(ODD)},
            {"request_id": "nobody", "abort_all": 0},
        )
    )
    odd = draw.choice((*ODD, [entry | {"shape": [2**62, 2**62]}], {"pid": 1, "descriptor": 0, "inode": 0}))
    return body | {draw.choice([*body]): odd}


def http(path: str, content: bytes, headers: str, *, method: str = "POST") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


def answer_to(worker: Served, content: bytes) -> Answer:
    """The first answer; status 0 where there is none: half a call is waited for."""
    with socket.create_connection(("127.0.0.1", worker.port), timeout=TIMEOUT_S) as connection:
        connection.sendall(content)
        found = b""
        while not is_whole(found):
            if not found and not content.endswith((b"}", b"\r\n\r\n")):
                connection.settimeout(0.5)
            try:
                piece = connection.recv(2**16)
            except (TimeoutError, ConnectionResetError):
                break
            if not piece:
                break
            found = (found + piece).removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    head, _, body = found.partition(b"\r\n\r\n")
    kinds = [line.split(b":")[1].strip() for line in head.split(b"\r\n") if line.lower().startswith(b"content-type:")]
    return Answer(int(head.split()[1]) if head else 0, kinds[0].decode() if kinds else "", body)


def check_completions(content: bytes, answer: Answer) -> None:
    """A call to `/generate` that is served gets what it asked for, in the form that it asked for, and no byte more."""
    body = json.loads(content.partition(b"\r\n\r\n")[2])
    assert answer.content_type == (protocol.ARRAYS if body.get("as_arrays") is True else JSON)
    request = protocol.request_from_json(
        body,
        default_id="r",
        max_samples=SAMPLES_PER_PLACE * MAX_BATCH_SIZE,
        max_prompt_length=MAX_MODEL_LEN,
    )
    found: Any = answer.body
    if answer.content_type == JSON:
        found = json.loads(answer.body)
        found = found if "n" in body else [found]
    checked_completions(found, request, worker="the worker", vocab_size=VOCAB_SIZE, weights=None)


def is_whole(answer: bytes) -> bool:
    head, end, body = answer.partition(b"\r\n\r\n")
    sizes = [int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    return bool(end) and bool(sizes) and len(body) >= sizes[0]


@pytest.mark.parametrize("has_key", [True, False])
def test_whatever_is_sent_is_answered_and_nobody_else_notices(worker: Served, fuzz: Fuzz, has_key: bool) -> None:
    draw = fuzz.random()
    shown = "".join(f"{name}: {value}\r\n" for name, value in worker.access.headers.items())
    goods = [http(protocol.GENERATE, json.dumps(GOOD | form).encode(), shown) for form in FORMS]
    expected = [answer_to(worker, content) for content in goods]
    assert [each.status for each in expected] == [200, 200, 200]
    assert [each.content_type for each in expected] == [JSON, JSON, protocol.ARRAYS]
    before = psutil.Process().memory_info().rss
    with ThreadPoolExecutor(1) as beside:
        for _ in range(fuzz.num_cases(60)):
            content = malformed(draw, shown if has_key else "")
            which = draw.randrange(len(FORMS))
            good = beside.submit(answer_to, worker, goods[which])
            answer = answer_to(worker, content)
            status, _, body = answer
            assert status in BLAMELESS | {0}, (content[:300], answer)
            if not has_key:
                # An `Expect:` that nobody can meet is refused by HTTP itself (417), whoever asks.
                assert status in (0, 400, 403, 417), content[:300]
            if status >= 400 and body:
                assert set(json.loads(body)) == {"error", "type"}, (content[:300], answer)
            if status == 200 and content.startswith(b"POST /generate "):
                check_completions(content, answer)
            assert good.result(TIMEOUT_S) == expected[which], content[:300]
    assert psutil.Process().memory_info().rss - before < 50 * 2**20


def test_arrays_are_right_whatever_else_a_request_says(worker: Served, fuzz: Fuzz) -> None:
    draw, num_arrays = fuzz.random(), 0
    shown = "".join(f"{name}: {value}\r\n" for name, value in worker.access.headers.items())
    for _ in range(fuzz.num_cases(60)):
        body = GOOD | {"as_arrays": True, "max_tokens": draw.randrange(1, 40)}
        for _ in range(draw.randrange(3)):
            body |= {draw.choice(FIELDS): draw.choice(ODD)}
        content = http(protocol.GENERATE, json.dumps(body).encode(), shown)
        answer = answer_to(worker, content)
        assert answer.status in BLAMELESS, (content[:300], answer)
        if answer.status == 200:
            check_completions(content, answer)
        else:
            assert set(json.loads(answer.body)) == {"error", "type"}, (content[:300], answer)
        num_arrays += answer.content_type == protocol.ARRAYS
    assert num_arrays > 0


@pytest.mark.fuzz
def test_connections_that_stop_halfway_keep_nobody_out(worker: Served, fuzz: Fuzz) -> None:
    draw = fuzz.random()
    shown = "".join(f"{name}: {value}\r\n" for name, value in worker.access.headers.items())
    opened = []
    for _ in range(fuzz.num_cases(300)):
        content = malformed(draw, shown)
        connection = socket.create_connection(("127.0.0.1", worker.port), timeout=TIMEOUT_S)
        connection.sendall(content[: draw.randrange(len(content))])
        opened.append(connection)
        if len(opened) % 50 == 0:
            assert worker.call(protocol.GENERATE, GOOD)[0] == 200
    for connection in opened:
        connection.close()
