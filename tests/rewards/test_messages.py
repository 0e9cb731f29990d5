"""What a judge's process and its pool say to each other."""

from __future__ import annotations

import json
import math
import pickle
from typing import Any

import pytest

from xrl.rewards.framing import BadMessage
from xrl.rewards.judge import MAX_DETAIL_CHARS, MAX_REWARD, failed_verdict
from xrl.rewards.messages import (
    End,
    Start,
    decode_end,
    decode_question,
    decode_start,
    decode_verdict,
    encode_end,
    encode_prompt,
    encode_question,
    encode_start,
    encode_verdict,
)
from xrl.types import Prompt, Verdict

VERDICT: dict[str, Any] = {"number": 7, "reward": 0.5, "failure": "", "detail": "", "location": ""}


@pytest.mark.parametrize("text", ["", "é 中 🎂 \0\x1b\u2028", "\ud83d", "\ud83d\ude00", "\udc80\ud800"], ids=ascii)
def test_question_arrives_as_it_was(text: str) -> None:
    """Two halves of a character stay two."""
    prompt = Prompt(
        id=2**70,
        token_ids=[0, 151_643],
        text=text,
        ground_truth=text,
        data_source=text,
        extra={text: [text, 0.1, -0.0, math.inf, 2**80, None, True], "nested": {"a": {}}},
    )
    assert decode_question(encode_question(3, text, encode_prompt(prompt))) == (3, text, prompt)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, -1 / 3, 5e-324, MAX_REWARD, -MAX_REWARD])
def test_reward_arrives_to_the_bit(reward: float) -> None:
    assert decode_verdict(encode_verdict(7, Verdict(reward=reward)), 7) == Verdict(reward=reward)


def test_failure_arrives_with_its_reason_and_place() -> None:
    verdict = failed_verdict("ValueError", "no number", "mine.py, line 3, in reward")
    assert decode_verdict(encode_verdict(7, verdict), 7) == verdict


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"null",
        b"[]",
        b"7",
        b'{"number": 7}',
        b"[" * 60_000,
        b'{"a":' * 10_000,
        b"\xff\xfe",
        b"9" * 5_000,
        pickle.dumps(Verdict(reward=1.0)),
        json.dumps({**VERDICT, "more": 1}).encode(),
        json.dumps({**VERDICT, "reward": math.nan}).encode(),
        json.dumps({**VERDICT, "reward": -math.inf}).encode(),
        json.dumps(VERDICT).replace("0.5", "1e999").encode(),
        json.dumps(VERDICT).replace("0.5", "9" * 400).encode(),
        json.dumps(VERDICT).encode() * 2,
        *(
            json.dumps({**VERDICT, name: value}).encode()
            for name, value in [
                ("number", 6),
                ("number", True),
                ("number", 7.0),
                ("number", None),
                ("reward", True),
                ("reward", "1"),
                ("reward", [1]),
                ("reward", None),
                ("reward", MAX_REWARD * 1.001),
                ("failure", "both"),
                ("failure", 1),
                ("detail", None),
                ("location", {}),
            ]
        ),
    ],
    ids=lambda message: repr(message[:40]),
)
def test_anything_else_is_a_bad_message(message: bytes) -> None:
    with pytest.raises(BadMessage):
        decode_verdict(message, 7)


def test_answer_to_another_question_is_none() -> None:
    with pytest.raises(BadMessage, match="answered question 6 and was asked question 7"):
        decode_verdict(encode_verdict(6, Verdict(reward=1.0)), 7)


def test_text_of_a_judge_is_one_short_line_without_commands() -> None:
    odd = {**VERDICT, "reward": None, "failure": "E\x1b\n", "detail": "a\nb\u2028\x9b\u202e\ud800" + "x" * 10_000}
    verdict = decode_verdict(json.dumps({**odd, "location": "\tp"}).encode(), 7)
    assert verdict.failure == "E\\x1b\\n" and verdict.location == "\\tp"
    assert verdict.detail.startswith("a\\nb\\u2028\\x9b\\u202e\\ud800x") and len(verdict.detail) < 2 * MAX_DETAIL_CHARS
    assert verdict.error.isprintable()


def test_start_and_end_arrive_as_they_were() -> None:
    for start in (Start(error="", checks_truths=True), Start(error="no such file", checks_truths=False)):
        assert decode_start(encode_start(start)) == start
    assert decode_start(b'{"error": "a\\nb", "checks_truths": false}').error == "a\\nb"
    for end in (End(code=-9, failure="memory limit", detail="4 GB"), End(code=None, failure="", detail="")):
        assert decode_end(encode_end(end)) == end
    for message in (b'{"error": "", "checks_truths": 1}', b"{}", b'{"code": "0", "failure": "", "detail": ""}'):
        with pytest.raises(BadMessage):
            decode_start(message)
        with pytest.raises(BadMessage):
            decode_end(message)
