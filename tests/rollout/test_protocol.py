"""What goes over HTTP: a request comes out as it went in, and answers as LMDeploy's schema and as arrays."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest

from tests.rollout.engines import request
from tests.samples import answer, contents
from xrl.rollout import protocol
from xrl.rollout.answers import WeightsId, checked_completions
from xrl.types import Completion, GenerateRequest

ASKED = request(
    [5, 6, 7, 2**31],
    id="12-3.1",
    num_samples=3,
    first_sample=4,
    num_drawn=2,
    temperature=0.7,
    top_k=5,
    top_p=0.9,
    max_new_tokens=9,
    stop_token_ids=(2, 99),
    seed=2**63 - 1,
)
ANSWERS = [answer(5, 6, 2, version=3), answer(version=3, reason="abort"), answer(7, version=3, logprobs=[-1e-45])]


def read(body: dict[str, Any], *, max_samples: int = 8, max_prompt_length: int = 10) -> GenerateRequest:
    return protocol.request_from_json(
        body, default_id="request-0", max_samples=max_samples, max_prompt_length=max_prompt_length
    )


def test_a_request_comes_out_as_it_went_in() -> None:
    assert read(json.loads(json.dumps(protocol.request_to_json(ASKED)))) == ASKED


def test_a_trainer_asks_for_arrays_and_for_all_that_it_checks() -> None:
    body = protocol.request_to_json(ASKED)
    assert body["as_arrays"] is body["return_logprob"] is body["include_stop_str_in_output"] is True


def test_what_is_left_out_has_a_default() -> None:
    assert read({"input_ids": [5]}) == request([5], id="request-0", max_new_tokens=512)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n": 9}, r"n must be a whole number in \[1, 8\], found 9"),
        ({"input_ids": [1] * 11}, "input_ids must be a list of at most 10 whole numbers, found a list of 11"),
        ({"input_ids": None}, "input_ids must be a list of at most 10 whole numbers, found None"),
        ({"input_ids": [2**63]}, "input_ids must hold whole numbers in"),
        ({"num_drawn": 10}, r"num_drawn must be a whole number in \[0, 9\], found 10"),
        ({"max_tokens": 0}, "max_tokens must be a whole number in"),
        ({"temperature": -0.1}, "temperature must be a number in"),
        ({"seed": 2**63}, "seed must be a whole number in"),
        ({"request_id": "a\nb"}, "request_id must be a text of 1 to 200 printable characters"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a list"),
    ],
)
def test_a_field_that_cannot_be_is_named_with_what_was_found(changes: dict[str, Any], words: str) -> None:
    body = protocol.request_to_json(ASKED) | changes
    with pytest.raises(ValueError, match=words):
        read(body)


def test_bounds_are_the_worker_s() -> None:
    body = protocol.request_to_json(ASKED) | {"n": 9, "input_ids": [1] * 11}
    assert len(read(body, max_samples=9, max_prompt_length=11).token_ids) == 11


@pytest.mark.parametrize("none", [[], None])
def test_no_stop_tokens_may_be_said_in_two_ways(none: list[int] | None) -> None:
    assert read({"input_ids": [5], "stop_token_ids": none}).sampling.stop_token_ids == ()


def test_an_answer_as_lmdeploy_returns_it() -> None:
    found = protocol.completion_to_json(answer(5, 2, version=3), num_prompt_tokens=4, run_id="a-run")
    assert json.loads(json.dumps(found)) == {
        "output_ids": [5, 2],
        "meta_info": {
            "prompt_tokens": 4,
            "completion_tokens": 2,
            "finish_reason": {"type": "stop"},
            "weights_version": 3,
            "weights_run": "a-run",
            "output_token_logprobs": [[-5 / 16, 5], [-2 / 16, 2]],
        },
    }


def test_arrays_are_a_header_then_all_ids_then_all_log_probs() -> None:
    body = protocol.completions_to_bytes(ANSWERS, num_prompt_tokens=4, run_id=None)
    (length,) = struct.unpack_from("<I", body)
    header = json.loads(body[4 : 4 + length])
    assert [meta["completion_tokens"] for meta in header] == [3, 0, 1]
    assert [meta["finish_reason"]["type"] for meta in header] == ["stop", "abort", "stop"]
    assert {(meta["prompt_tokens"], meta["weights_version"], meta["weights_run"]) for meta in header} == {(4, 3, None)}
    numbers = struct.unpack("<4i4f", body[4 + length :])
    assert numbers == (5, 6, 2, 7, -5 / 16, -6 / 16, -2 / 16, np.float32(-1e-45))


def test_arrays_say_the_same_on_a_machine_of_the_other_byte_order() -> None:
    swapped = [
        Completion(
            token_ids=each.token_ids.astype(">i4"),
            logprobs=each.logprobs.astype(">f4"),
            finish_reason=each.finish_reason,
            weights_version=each.weights_version,
        )
        for each in ANSWERS
    ]
    bodies = [protocol.completions_to_bytes(each, num_prompt_tokens=4, run_id="r") for each in (ANSWERS, swapped)]
    assert bodies[0] == bodies[1]


def test_both_forms_are_read_as_the_completions_that_were_sent() -> None:
    asked = request([5], num_samples=3, stop_token_ids=(2, 7), max_new_tokens=9)
    as_json = [protocol.completion_to_json(each, num_prompt_tokens=1, run_id="a-run") for each in ANSWERS]
    as_arrays = protocol.completions_to_bytes(ANSWERS, num_prompt_tokens=1, run_id="a-run")
    for found in (json.loads(json.dumps(as_json)), as_arrays):
        read_back = checked_completions(
            found, asked, worker="rollout worker 0", vocab_size=10, weights=WeightsId(run_id="a-run", version=3)
        )
        assert list(map(contents, read_back)) == list(map(contents, ANSWERS))
