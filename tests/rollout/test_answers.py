"""What is taken of a worker's answer, and what costs the worker: each field by itself, and over HTTP."""

from __future__ import annotations

import asyncio
import json
import logging
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web

from tests import samples
from tests.rollout.answering_worker import HEALTHY, RUN, Answer, AnsweringWorker, answer_well, fleet_of, good_answer
from tests.rollout.fleets import VOCAB_SIZE, generate, request
from xrl.rollout.answers import (
    StaleAnswer,
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
from xrl.rollout.fleet import RolloutCounts, WorkerGone
from xrl.rollout.roster import FAULTS_IN_A_ROW
from xrl.types import Completion, GenerateRequest, SamplingParams

WORKER = "rollout worker 1 (10.0.0.2:8000)"
ASKED = GenerateRequest(
    id="r", token_ids=[5, 6, 7], num_samples=2, sampling=SamplingParams(max_new_tokens=4, stop_token_ids=(7,))
)


def answer() -> list[dict[str, Any]]:
    return [*good_answer(ASKED)]


def checked(found: object, *, version: int | None = None) -> list[Completion]:
    weights = None if version is None else WeightsId(run_id=RUN, version=version)
    return checked_completions(found, ASKED, worker=WORKER, vocab_size=512, weights=weights)


def test_an_answer_as_it_was_asked_for_is_taken() -> None:
    expected = samples.answer(5, 6, 7, logprobs=[-0.5, -1.5, -2.5], reason="stop", version=0)
    assert checked(answer(), version=0) == [expected] * 2


@pytest.mark.parametrize("run_id", [None, "another-run"])
def test_weights_of_another_run_under_the_same_number_are_not_ours(run_id: str | None) -> None:
    found = answer()
    found[1]["meta_info"]["weights_run"] = run_id
    with pytest.raises(StaleAnswer, match="sampled with another run's weights, not version 0 of this run"):
        checked(found, version=0)


def test_an_answer_that_was_cut_off_may_be_empty() -> None:
    found = answer()
    found[0]["output_ids"] = found[0]["meta_info"]["output_token_logprobs"] = []
    found[0]["meta_info"] |= {"finish_reason": {"type": "abort"}, "completion_tokens": 0}
    assert checked(found)[0] == samples.answer(reason="abort")


@pytest.mark.parametrize(("ids", "reason"), [([5, 7], "stop"), ([1, 2, 3, 4], "length"), ([5, 6], "abort")])
def test_an_answer_that_was_whole_when_it_was_cut_off_is_whole(ids: list[int], reason: str) -> None:
    found = answer()
    found[0]["output_ids"] = ids
    pairs = [[-1.0, token] for token in ids]
    found[0]["meta_info"] |= {
        "finish_reason": {"type": "abort"},
        "completion_tokens": len(ids),
        "output_token_logprobs": pairs,
    }
    assert checked(found)[0].finish_reason == reason


def test_an_answer_may_end_at_its_longest() -> None:
    found = answer()
    found[1]["output_ids"] = [1, 2, 3, 4]
    pairs = [[-1.0, token] for token in (1, 2, 3, 4)]
    found[1]["meta_info"] |= {
        "finish_reason": {"type": "length"},
        "completion_tokens": 4,
        "output_token_logprobs": pairs,
    }
    assert checked(found)[1].finish_reason == "length"


def test_rounding_above_zero_is_taken_as_it_is_and_an_integer_is_a_number() -> None:
    found = answer()
    found[0]["meta_info"]["output_token_logprobs"] = [[1e-7, 5], [0, 6], [-1, 7]]
    assert checked(found)[0] == samples.answer(5, 6, 7, logprobs=[1e-7, 0.0, -1.0])


def at(*path: str | int) -> Callable[[Any], Callable[[list[Any]], None]]:
    """Sets what is there in the second completion."""

    def to(value: Any) -> Callable[[list[Any]], None]:
        def change(found: list[Any]) -> None:
            place = found[1]
            for name in path[:-1]:
                place = place[name]
            place[path[-1]] = value

        return change

    return to


def drop(*path: str) -> Callable[[list[Any]], None]:
    def change(found: list[Any]) -> None:
        place = found[1]
        for name in path[:-1]:
            place = place[name]
        del place[path[-1]]

    return change


PAIRS = ("meta_info", "output_token_logprobs")
FAULTS = {
    "completion 2 of 2: output_ids[1] is 512, not a token of the model (512)": at("output_ids", 1)(512),
    "output_ids[0] is -1, not a token": at("output_ids", 0)(-1),
    "output_ids[1] is True, not a token": at("output_ids", 1)(True),
    "output_ids[1] is 6.0, not a token": at("output_ids", 1)(6.0),
    "output_ids[1] is '6', not a token": at("output_ids", 1)("6"),
    "output_ids[1] is None, not a token": at("output_ids", 1)(None),
    "output_ids is '567', not a list": at("output_ids")("567"),
    "output_ids holds 5 tokens, more than the 4": at("output_ids")([1, 2, 3, 4, 7]),
    "output_ids[0] is the stop token 7, and the answer goes on": at("output_ids", 0)(7),
    "type is 'stop', but output_ids is empty": at("output_ids")([]),
    "type is 'stop', but output_ids ends with 8": at("output_ids", 2)(8),
    "type is 'length', but output_ids holds 3 of 4": at("meta_info", "finish_reason", "type")("length"),
    "finish_reason.type is 'weird', not one of stop, length": at("meta_info", "finish_reason", "type")("weird"),
    "finish_reason.type is [], not one of": at("meta_info", "finish_reason", "type")([]),
    "meta_info.finish_reason is 'stop', not a JSON object": at("meta_info", "finish_reason")("stop"),
    "meta_info.finish_reason.type is missing": at("meta_info", "finish_reason")({}),
    "output_token_logprobs is None, not a list": at(*PAIRS)(None),
    "output_token_logprobs holds 0 log-probs of 3 tokens": at(*PAIRS)([]),
    "output_token_logprobs does not hold pairs": at(*PAIRS)([[-1.0, 5], [-1.0], [-1.0, 7]]),
    "output_token_logprobs does not hold pairs ": at(*PAIRS)([[-1.0, 5, 0]] * 3),
    "output_token_logprobs does not hold pairs [": at(*PAIRS)([1, 2, 3]),
    "output_token_logprobs[1] is of token 5, output_ids[1] is 6": at(*PAIRS, 1, 1)(5),
    "output_token_logprobs[1] is of token 6.0": at(*PAIRS, 1, 1)(6.0),
    "output_token_logprobs[2] has log-prob nan": at(*PAIRS, 2, 0)(float("nan")),
    "output_token_logprobs[0] has log-prob nan": at(*PAIRS, 0, 0)(float("nan")),
    "output_token_logprobs[0] has log-prob inf": at(*PAIRS, 0, 0)(float("inf")),
    "output_token_logprobs[0] has log-prob -inf": at(*PAIRS, 0, 0)(float("-inf")),
    "output_token_logprobs[0] has log-prob 5.0": at(*PAIRS, 0, 0)(5.0),
    "output_token_logprobs[0] has log-prob 0.01": at(*PAIRS, 0, 0)(0.01),
    "output_token_logprobs[0] has log-prob -1e+300": at(*PAIRS, 0, 0)(-1e300),
    "output_token_logprobs[0] has log-prob -1000000": at(*PAIRS, 0, 0)(-(10**400)),
    "output_token_logprobs[0] has log-prob False": at(*PAIRS, 0, 0)(False),
    "output_token_logprobs[0] has log-prob '-1'": at(*PAIRS, 0, 0)("-1"),
    "meta_info.prompt_tokens is 2, not 3": at("meta_info", "prompt_tokens")(2),
    "meta_info.completion_tokens is 3.0, not 3": at("meta_info", "completion_tokens")(3.0),
    "meta_info.weights_version is '0', not a version": at("meta_info", "weights_version")("0"),
    "meta_info.weights_version is True": at("meta_info", "weights_version")(True),
    "meta_info is missing": drop("meta_info"),
    "output_ids is missing": drop("output_ids"),
    "meta_info.output_token_logprobs is missing": drop(*PAIRS),
    "meta_info is [], not a JSON object": at("meta_info")([]),
    "holds 1 completions, not 2 as asked for": lambda found: found.pop(),
    "holds 3 completions, not 2 as asked for": lambda found: found.append(found[0]),
}


@pytest.mark.parametrize("words", FAULTS)
def test_a_wrong_field_is_the_workers_fault_and_is_named(words: str) -> None:
    found = answer()
    FAULTS[words](found)
    with pytest.raises(WorkerFault) as caught:
        checked(found)
    assert str(caught.value).startswith(f"{WORKER}: ") and words.strip() in str(caught.value)


def test_an_answer_of_other_weights_is_stale_and_no_fault() -> None:
    with pytest.raises(StaleAnswer, match=r"weights version 0, not version 3"):
        checked(answer(), version=3)


def test_what_a_worker_wrote_is_shown_short_and_obeyed_by_no_terminal() -> None:
    found = answer()
    found[0]["meta_info"]["finish_reason"]["type"] = "\x1b[2J\u202e" + "x" * 10_000
    with pytest.raises(WorkerFault) as caught:
        checked(found)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"[1, 2", "is no JSON"),
        (b"", "is no JSON"),
        (b"\xff\xfe\x00", "is no JSON"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a": 1, "a": 2}', "a key is said twice"),
        (b"1" * 5000, "is no JSON"),
    ],
)
def test_a_body_that_nobody_can_mean_is_no_json(body: bytes, words: str) -> None:
    with pytest.raises(WorkerFault, match=words):
        parse_json(body, worker=WORKER, where="/generate: the answer")


@pytest.mark.parametrize("odd", [None, True, 0, -1, 1.5, "7", [], {}, [7], {"a": 1}])
def test_every_other_answer_has_fields_of_their_types(odd: Any) -> None:
    wrong: list[Callable[[], object]] = [
        lambda: checked_checksum({"checksum": odd}, worker=WORKER),
        lambda: check_updated({"weights_version": odd}, WeightsId(run_id=RUN, version=7), worker=WORKER),
        lambda: checked_max_requests({"max_requests": odd}, worker=WORKER),
        lambda: checked_port({"port": odd}, worker=WORKER),
        lambda: checked_refusal({"type": odd, "error": None}, worker=WORKER),
        lambda: checked_checksum(odd, worker=WORKER),
        lambda: check_updated(odd, WeightsId(run_id=RUN, version=7), worker=WORKER),
    ]
    for check in wrong:
        with pytest.raises(WorkerFault, match=r"rollout worker 1 \(10.0.0.2:8000\): "):
            check()


def changed(edit: Callable[[list[dict[str, Any]]], object]) -> Answer:
    async def answer_so(_: web.Request, asked: GenerateRequest) -> web.StreamResponse:
        found = good_answer(asked)
        edit(found)
        return web.json_response(found)

    return answer_so


def raw(body: bytes, *, status: int = 200, content_type: str = "application/json", **headers: str) -> Answer:
    async def answer_so(*_: object) -> web.StreamResponse:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.Response(body=body, status=status, headers={"Content-Type": content_type, **names})

    return answer_so


async def endless(http: web.Request, _: GenerateRequest) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(http)
    with pytest.raises((ConnectionError, asyncio.CancelledError)):
        while True:
            await response.write(b"[" + b" " * (1 << 20))
    return response


WRONG: dict[str, Answer] = {
    "is 'text/html', not application/json": raw(b"<html>", content_type="text/html"),
    "is 'text/html', not application/json ": raw(b"<html>", status=502, content_type="text/html"),
    "the answer is ['x'], not a JSON object": raw(b'["x"]', status=500),
    "type is missing": raw(b"{}", status=503),
    "type and error are 'EngineError' and [1], not text": raw(b'{"type": "EngineError", "error": [1]}', status=500),
    "is no JSON": raw(b'[{"output_ids": [1'),
    "nested too deep": raw(b"[" * 100_000),
    "is longer than 1,0": endless,
    "is compressed": raw(zlib.compress(b"[" + b" " * (1 << 26)), Content_Encoding="deflate"),
    "the answer is {}, not a list of 2 completions": raw(b"{}"),
    "type is missing ": raw(b"{}", status=307, Location="/health"),
    "is 1000000, not a token of the model": changed(lambda found: found[0]["output_ids"].__setitem__(0, 10**6)),
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_answers_in_a_row_cost_the_only_worker_and_its_name_and_the_field_are_said(words: str) -> None:
    worker = AnsweringWorker(WRONG[words])
    with fleet_of(worker, rollout_max_retries=9) as fleet, pytest.raises(WorkerGone) as caught:
        generate(fleet, [request(0)])
    sentence = str(caught.value)
    assert sentence.startswith(f"no rollout worker is left (rollout worker 0 (127.0.0.1:{worker.port}): 3 wrong ans")
    assert words.strip() in sentence and sentence.isprintable()
    assert worker.num_asked == FAULTS_IN_A_ROW == 3


def test_requests_of_a_worker_that_answers_wrongly_go_to_the_other_one(caplog: pytest.LogCaptureFixture) -> None:
    liar, honest = AnsweringWorker(changed(lambda found: found.pop())), AnsweringWorker()
    with fleet_of(liar, honest, rollout_max_batch_size=8) as fleet:
        results, counts = generate(fleet, [request(place) for place in range(30)])
        assert [worker.number for worker in fleet.ready()] == [1] and fleet.num_lost == 1
    assert all(answers and answers[0].token_ids[-1] == place for place, answers in results.items())
    assert counts == RolloutCounts(sent=30, finished=30, retried=counts.retried) and counts.retried >= 3
    assert "the answer holds 1 completions, not 2 as asked for" in caplog.text


def test_a_wrong_answer_now_and_then_is_asked_for_again_and_costs_no_worker() -> None:
    worker = AnsweringWorker()

    async def wrong_at_times(http: web.Request, asked: GenerateRequest) -> web.StreamResponse:
        is_wrong = worker.num_asked % FAULTS_IN_A_ROW
        return await (raw(b"{}")(http, asked) if is_wrong else answer_well(http, asked))

    worker.answer = wrong_at_times
    with fleet_of(worker, rollout_max_batch_size=2, rollout_max_retries=20) as fleet:  # one request at a time
        results, counts = generate(fleet, [request(place) for place in range(6)])
        assert all(results.values()) and counts.retried == 12 and fleet.num_lost == 0


def test_a_request_that_is_given_up_says_why() -> None:
    refusal = json.dumps({"type": "EngineError", "error": "out of \x1b[2J\nmemory"}).encode()
    with fleet_of(AnsweringWorker(raw(refusal, status=500)), rollout_max_retries=1) as fleet:
        results, counts = generate(fleet, [request(0)])
    assert results == {0: None}
    assert counts.why_failed.endswith("): EngineError: out of \\x1b[2J memory")


@pytest.mark.parametrize("odd", [[], "ok", {**HEALTHY, "max_requests": "many"}, {**HEALTHY, "max_requests": 0}])
def test_what_is_no_worker_is_named_at_the_start(odd: Any) -> None:
    with fleet_of(AnsweringWorker(health=odd)) as fleet, pytest.raises(WorkerFault, match="rollout worker 0 .*: "):
        fleet.wait_until_ready()


def test_a_worker_that_was_lost_for_its_answers_is_taken_back_only_so_often(caplog: pytest.LogCaptureFixture) -> None:
    liar, honest = AnsweringWorker(raw(b"{}")), AnsweringWorker()
    with caplog.at_level(logging.CRITICAL), fleet_of(liar, honest, rollout_max_restarts=2) as fleet:
        for num_lost in (1, 2, 3, 3):
            generate(fleet, [request(place) for place in range(6)])
            assert fleet.num_lost == num_lost
            assert len(fleet.reachable()) == (2 if num_lost < 3 else 1)  # as an update asks


def test_vocabulary_of_the_fleet_is_what_ids_are_held_against() -> None:
    for token, is_taken in ((VOCAB_SIZE - 1, True), (VOCAB_SIZE, False)):
        edit = changed(lambda found, token=token: _set_first(found, token))
        with fleet_of(AnsweringWorker(edit), rollout_max_retries=0) as fleet:
            results, _ = generate(fleet, [request(0)])
        assert bool(results[0]) == is_taken


def _set_first(found: list[dict[str, Any]], token: int) -> None:
    for one in found:
        one["output_ids"][0] = one["meta_info"]["output_token_logprobs"][0][1] = token
