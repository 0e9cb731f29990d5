"""Answers of workers with anything in the place of anything: what is taken is right, and what is not is named."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.fuzz.conftest import Fuzz
from tests.rollout.answering_worker import RUN, as_arrays, good_answer
from xrl.rollout.answers import (
    WeightsId,
    WorkerFault,
    check_updated,
    checked_checksum,
    checked_completions,
    checked_max_requests,
    checked_port,
    checked_refusal,
    parse_json,
)
from xrl.types import Completion, GenerateRequest, SamplingParams

VOCAB_SIZE, STOP = 50, 9
WORKER = "rollout worker 3 (127.0.0.1:9)"
ASKED = GenerateRequest(
    id="r", token_ids=[5, 6, STOP], num_samples=2, sampling=SamplingParams(max_new_tokens=5, stop_token_ids=(STOP,))
)
ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 49, 50, 1.0, 3.0, -0.5, 0.5, 1e-9, 1e308, -1e308, 10**30, -(10**400), 2**63),
    *(
        math.nan,
        math.inf,
        -math.inf,
        "",
        "7",
        "stop",
        "abort",
        "\x1b[2J",
        "\ud83d",
        "x" * 2000,
        [],
        {},
        [[]],
        [None],
    ),
    *([5, 6, STOP], [[-1.0, 5]], {"type": "stop"}, {"type": ["stop"]}, [{}] * 3, [0] * 100, {"": ""}),
]
Path = tuple[str | int, ...]


def places(value: Any, path: Path = ()) -> Iterator[Path]:
    """Of every value within, the outermost first."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in inside:
        yield from places(part, (*path, name))


def replaced(value: Any, path: Path, other: Any) -> Any:
    if not path:
        return other
    copied = copy.copy(value)
    copied[path[0]] = replaced(value[path[0]], path[1:], other)
    return copied


def removed(value: Any, path: Path) -> Any:
    copied = copy.copy(value)
    if len(path) > 1:
        copied[path[0]] = removed(value[path[0]], path[1:])
    else:
        del copied[path[0]]
    return copied


def is_right(completion: Completion) -> bool:
    """The same rules, one token after the other."""
    ids, logprobs, reason = completion.token_ids.tolist(), completion.logprobs.tolist(), completion.finish_reason
    return (
        (completion.token_ids.dtype, completion.logprobs.dtype) == (np.int32, np.float32)
        and all(0 <= token < VOCAB_SIZE for token in ids)
        and all(-1e5 <= value <= np.float32(1e-3) for value in logprobs)
        and len(ids) == len(logprobs) <= 5
        and STOP not in ids[:-1]
        and type(completion.weights_version) is int
        and (
            (reason == "stop" and ids[-1:] == [STOP])
            or (reason == "length" and len(ids) == 5)
            or reason in ("abort", "error")
        )
    )


def take(body: bytes, *, is_arrays: bool = False) -> bool:
    """Whether an answer was taken; if so it is right, if not the error is one printable line that names the worker."""
    try:
        found = body if is_arrays else parse_json(body, worker=WORKER, where="the answer")
        completions = checked_completions(found, ASKED, worker=WORKER, vocab_size=VOCAB_SIZE, weights=None)
    except WorkerFault as error:
        words = str(error)
        assert words.startswith(f"{WORKER}: ") and words.isprintable() and len(words) < 1500, words
        return False
    assert len(completions) == ASKED.num_samples and all(map(is_right, completions)), body
    return True


def json_of(value: Any) -> bytes:
    return json.dumps(value).encode()


def answer() -> list[Any]:
    return [*good_answer(ASKED)]


def test_every_field_may_be_anything() -> None:
    whole = answer()
    assert take(json_of(whole))
    taken = [(path, odd) for path in places(whole) for odd in ODD if take(json_of(replaced(whole, path, odd)))]
    # A log-prob, the version and the reason may be something else; what is the same as before is among ODD, too.
    is_other = {path[-1] for path, odd in taken if odd not in (3, [5, 6, STOP], {"type": "stop"})}
    assert is_other <= {0, "weights_version", "weights_run", "type"}
    assert len(taken) < 0.1 * len(ODD) * len(list(places(whole)))
    for path in places(whole):
        assert not path or not take(json_of(removed(whole, path))), path


def test_many_fields_may_be_anything_at_once(fuzz: Fuzz) -> None:
    source = fuzz.random()
    for _ in range(fuzz.num_cases(2000)):
        found: Any = answer()
        for _ in range(source.randint(1, 4)):
            path = source.choice(list(places(found)))
            found = (
                removed(found, path) if path and source.random() < 0.2 else replaced(found, path, source.choice(ODD))
            )
        take(json_of(found))


def test_bytes_may_be_anything(fuzz: Fuzz) -> None:
    source = fuzz.random()
    whole = json.dumps(answer()).encode()
    for _ in range(fuzz.num_cases(3000)):
        take(torn(whole, source))


def test_arrays_may_be_anything(fuzz: Fuzz) -> None:
    source = fuzz.random()
    whole = as_arrays(answer())
    assert take(whole, is_arrays=True)
    num_taken = 0
    for _ in range(fuzz.num_cases(3000)):
        # Tokens of few values, so that some of them are right.
        tokens = b"".join(source.choice((5, 6, STOP, VOCAB_SIZE)).to_bytes(4, "little") for _ in range(6))
        body = source.choice((whole, whole[:-48] + tokens + whole[-24:], whole[:-24] + source.randbytes(24)))
        num_taken += take(torn(body, source) if source.random() < 0.8 else body, is_arrays=True)
    assert num_taken > 0


def test_every_field_of_the_header_of_arrays_may_be_anything() -> None:
    whole = as_arrays(answer())
    header = json.loads(whole[4:-48])
    for path in places(header):
        for odd in ODD:
            text = json_of(replaced(header, path, odd))
            take(len(text).to_bytes(4, "little") + text + whole[-48:], is_arrays=True)
        if path:
            text = json_of(removed(header, path))
            assert not take(len(text).to_bytes(4, "little") + text + whole[-48:], is_arrays=True)


def torn(body: bytes, source: random.Random) -> bytes:
    kind = source.randrange(5)
    at, length = source.randrange(len(body)), source.randrange(1, 20)
    if kind == 0:
        return body[:at]
    if kind == 1:
        return body[:at] + body[at + length :]
    if kind == 2:
        return body[:at] + source.randbytes(length) + body[at:]
    if kind == 3:  # a part of it again
        return body[: at + length] + body[at:]
    return body[:at] + source.choice(b'0123456789-.,:[]{}"eE+').to_bytes() + body[at + 1 :]


@pytest.mark.parametrize("odd", ODD, ids=range(len(ODD)))
def test_every_other_answer_may_be_anything(odd: Any) -> None:
    for found in (odd, {"checksum": odd, "weights_version": odd, "max_requests": odd, "port": odd, "type": odd}):
        for check in (checked_checksum, checked_max_requests, checked_port, checked_refusal):
            try:
                value = check(found, worker=WORKER)
            except WorkerFault as error:
                assert str(error).startswith(f"{WORKER}: ") and str(error).isprintable() and len(str(error)) < 1500
            else:
                assert type(value) is int and value >= 1
        with pytest.raises(WorkerFault):
            check_updated(found, WeightsId(run_id=RUN, version=4), worker=WORKER)
