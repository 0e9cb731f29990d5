"""Completions as arrays: what a worker writes is read to the bit, and each lie of one is named."""

from __future__ import annotations

import json
import math
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from tests import samples
from tests.rollout.answering_worker import RUN, AnsweringWorker, as_arrays, fleet_of, good_answer
from tests.rollout.fleets import generate, request
from xrl.rollout import protocol
from xrl.rollout.answers import StaleAnswer, WeightsId, WorkerFault, checked_completions
from xrl.rollout.process import WorkerGone
from xrl.types import Completion, GenerateRequest, SamplingParams

WORKER = "rollout worker 1 (10.0.0.2:8000)"
ASKED = GenerateRequest(
    id="r", token_ids=[5, 6, 7], num_samples=2, sampling=SamplingParams(max_new_tokens=4, stop_token_ids=(7,))
)
Answers = list[dict[str, Any]]


def checked(body: bytes, *, version: int | None = None) -> list[Completion]:
    weights = None if version is None else WeightsId(run_id=RUN, version=version)
    return checked_completions(body, ASKED, worker=WORKER, vocab_size=512, weights=weights)


def whole() -> Answers:
    return [*good_answer(ASKED)]


def test_arrays_say_what_json_says() -> None:
    found = whole()
    as_json = checked_completions(found, ASKED, worker=WORKER, vocab_size=512, weights=None)
    assert list(map(samples.contents, checked(as_arrays(found)))) == list(map(samples.contents, as_json))


@pytest.mark.parametrize("padding", range(4))
def test_arrays_may_begin_at_any_byte(padding: int) -> None:
    expected = samples.answer(5, 6, 7, logprobs=[-0.5, -1.5, -2.5])
    found = checked(as_arrays(whole(), padding=padding))
    assert found == [expected] * 2
    assert all(each.token_ids.flags.aligned and each.logprobs.flags.aligned for each in found)


def test_answers_of_any_length_come_back_to_the_bit() -> None:
    odd = np.array([-0.1, -0.0, -1e-45, np.nextafter(np.float32(-1), np.float32(0))], np.float32)
    sent = [
        samples.answer(1, 2, 3, 511, reason="length", logprobs=odd.tolist(), version=9),
        samples.answer(reason="abort", version=9),
    ]
    body = protocol.completions_to_bytes(sent, num_prompt_tokens=3, run_id=RUN)
    found = checked(body, version=9)
    assert found == sent
    assert found[0].logprobs.tobytes() == odd.tobytes()


def test_arrays_may_all_be_empty() -> None:
    sent = [samples.answer(reason="abort")] * 2
    assert checked(protocol.completions_to_bytes(sent, num_prompt_tokens=3, run_id=None)) == sent


def test_a_token_is_eight_bytes() -> None:
    short, long = (
        protocol.completions_to_bytes([samples.answer(*[3] * length)], num_prompt_tokens=3, run_id=RUN)
        for length in (1000, 2000)
    )
    assert len(long) - len(short) == 8 * 1000


def at(*path: str | int) -> Callable[[Any], Callable[[Answers], None]]:
    """Sets what is there in the second completion."""

    def to(value: Any) -> Callable[[Answers], None]:
        def change(found: Answers) -> None:
            place: Any = found[1]
            for name in path[:-1]:
                place = place[name]
            place[path[-1]] = value

        return change

    return to


META, LOGPROBS = "meta_info", ("meta_info", "output_token_logprobs")
FAULTS = {
    "completion 2 of 2: output_ids[1] is 512, not a token of the model (512)": at("output_ids", 1)(512),
    "output_ids[0] is -1, not a token": at("output_ids", 0)(-1),
    "output_ids[0] is the stop token 7, and the answer goes on": at("output_ids", 0)(7),
    "type is 'stop', but output_ids ends with 8": at("output_ids", 2)(8),
    "type is 'length', but output_ids holds 3 of 4": at(META, "finish_reason", "type")("length"),
    "finish_reason.type is 'weird', not one of stop, length": at(META, "finish_reason", "type")("weird"),
    "meta_info.finish_reason is 'stop', not a JSON object": at(META, "finish_reason")("stop"),
    "output_token_logprobs[2] has log-prob nan": at(*LOGPROBS, 2, 0)(math.nan),
    "output_token_logprobs[0] has log-prob nan": at(*LOGPROBS, 0, 0)(math.nan),
    "output_token_logprobs[0] has log-prob inf": at(*LOGPROBS, 0, 0)(math.inf),
    "output_token_logprobs[0] has log-prob -inf": at(*LOGPROBS, 0, 0)(-math.inf),
    "output_token_logprobs[1] has log-prob 0.01": at(*LOGPROBS, 1, 0)(0.01),
    "output_token_logprobs[1] has log-prob -1e+06": at(*LOGPROBS, 1, 0)(-1e6),
    "meta_info.prompt_tokens is 2, not 3": at(META, "prompt_tokens")(2),
    "meta_info.completion_tokens is 3.0, not a number of tokens": at(META, "completion_tokens")(3.0),
    "meta_info.completion_tokens is -1, not a number of tokens": at(META, "completion_tokens")(-1),
    "meta_info.completion_tokens is True, not a number of tokens": at(META, "completion_tokens")(True),
    "meta_info.completion_tokens is 5, not a number of tokens up to the 4": at(META, "completion_tokens")(5),
    "48 bytes of tokens, and meta_info.completion_tokens say 56": at(META, "completion_tokens")(4),
    "48 bytes of tokens, and meta_info.completion_tokens say 40": at(META, "completion_tokens")(2),
    "meta_info.weights_version is '0', not a version": at(META, "weights_version")("0"),
    "meta_info.weights_run is 7, not the name of a run": at(META, "weights_run")(7),
    "holds 1 completions, not 2 as asked for": lambda found: found.pop(),
    "holds 3 completions, not 2 as asked for": lambda found: found.append(found[0]),
}


@pytest.mark.parametrize("words", FAULTS)
def test_a_wrong_field_is_the_workers_fault_and_is_named(words: str) -> None:
    found = whole()
    FAULTS[words](found)
    with pytest.raises(WorkerFault) as caught:
        checked(as_arrays(found))
    assert str(caught.value).startswith(f"{WORKER}: ") and words in str(caught.value)


@pytest.mark.parametrize(
    "name", ["prompt_tokens", "completion_tokens", "finish_reason", "weights_version", "weights_run"]
)
def test_a_missing_field_is_named(name: str) -> None:
    header = metas()
    del header[0][name]
    with pytest.raises(WorkerFault, match=f"completion 1 of 2: meta_info.{name} is missing"):
        checked(framed(header))


def metas() -> list[dict[str, Any]]:
    return [{name: part for name, part in one["meta_info"].items() if name != LOGPROBS[1]} for one in whole()]


def framed(header: object, tokens: bytes = as_arrays(whole())[-48:]) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<I", len(text)) + text + tokens


BROKEN = {
    "the answer has 0 bytes": b"",
    "the answer has 3 bytes": b"\x00\x00\x00",
    "its header, by its own word, 0": b"\x00\x00\x00",
    "its header, by its own word, 4,294,967,295": b"\xff" * 100,
    "bytes and its header, by its own word, 97": struct.pack("<I", 97) + b" " * 96,
    "by its own word, 8,193: at most 8,192 are taken": framed(b"[" + b" " * 8191 + b"]"),
    "the header is no JSON": framed(b""),
    "the header is no JSON: nested too deep": framed(b"[" * 8000),
    "a key is said twice": framed(b'[{"a": 1, "a": 2}, {}]'),
    "the answer is {}, not a list of 2 completions": framed({}),
    "completion 1 of 2: meta_info is 5, not a JSON object": framed([5, 5]),
    "holds 49 bytes of tokens, and meta_info.completion_tokens say 48": as_arrays(whole()) + b"\x00",
    "holds 47 bytes of tokens, and meta_info.completion_tokens say 48": as_arrays(whole())[:-1],
    "holds 0 bytes of tokens": as_arrays(whole())[:-48],
}


@pytest.mark.parametrize("words", BROKEN)
def test_a_body_whose_lengths_lie_is_named(words: str) -> None:
    body = BROKEN[words]
    if "8,193" in words:
        assert struct.unpack_from("<I", body) == (8193,)
    with pytest.raises(WorkerFault) as caught:
        checked(body)
    assert str(caught.value).startswith(f"{WORKER}: ") and words in str(caught.value)


def test_lengths_that_lie_cost_no_memory() -> None:
    asked = GenerateRequest(id="r", token_ids=[5], num_samples=1, sampling=SamplingParams(max_new_tokens=2**40))
    body = framed([{**metas()[0], "completion_tokens": 2**40}])
    tracemalloc.start()
    with pytest.raises(WorkerFault, match="meta_info.completion_tokens say 8,796,093,022,208"):
        checked_completions(body, asked, worker=WORKER, vocab_size=512, weights=None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_an_answer_of_other_weights_is_stale_and_no_fault() -> None:
    with pytest.raises(StaleAnswer, match=r"weights version 0, not version 3"):
        checked(as_arrays(whole()), version=3)


def answering(body: Callable[[Answers], bytes], content_type: str) -> AnsweringWorker:
    async def answer(http: web.Request, asked: GenerateRequest) -> web.StreamResponse:
        assert (await http.json())["as_arrays"] is True
        return web.Response(body=body(good_answer(asked)), content_type=content_type)

    return AnsweringWorker(answer)


@pytest.mark.parametrize(
    ("body", "content_type"),
    [(as_arrays, protocol.ARRAYS), (lambda found: json.dumps(found).encode(), "application/json")],
    ids=["arrays", "JSON"],
)
def test_a_trainer_asks_for_arrays_and_takes_json_too(body: Callable[[Answers], bytes], content_type: str) -> None:
    asked = request(3)
    with fleet_of(answering(body, content_type)) as fleet:
        results, _ = generate(fleet, [asked])
    assert results == {0: [samples.answer(*asked.token_ids, logprobs=[-0.5, -1.5])] * 2}


@pytest.mark.parametrize(
    ("body", "content_type", "words"),
    [
        (lambda found: json.dumps(found).encode(), protocol.ARRAYS, "by its own word"),
        (as_arrays, "application/json", "is no JSON"),
        (as_arrays, "application/octet-stream", "is 'application/octet-stream', not application/json"),
        (lambda _: bytes(5 << 20), protocol.ARRAYS, "is longer than 1,0"),
    ],
)
def test_what_comes_under_another_name_is_refused(
    body: Callable[[Answers], bytes], content_type: str, words: str
) -> None:
    with (
        fleet_of(answering(body, content_type), rollout_max_retries=9) as fleet,
        pytest.raises(WorkerGone) as caught,
    ):
        generate(fleet, [request(0)])
    assert words in str(caught.value)
