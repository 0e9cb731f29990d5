"""What a judge's process and its pool say to each other, as JSON of a fixed schema.

    judge  -> pool   {"error", "checks_truths"}                                  once: why it did not start, or ""
    pool   -> judge  {"number", "response", "prompt": {a Prompt's fields}}       a question
    judge  -> pool   {"number", "reward", "failure", "detail", "location"}          the verdict on it
    keeper -> pool   {"code", "failure", "detail"}                               once: how it ended

Questions are numbered, so that an answer to another one is none. Nothing that a judge's process sends is ever run, and
no text of its own is handed on as it came.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from xrl.rewards.framing import MAX_QUESTION_BYTES, BadMessage
from xrl.rewards.judge import MAX_REWARD, clean, failed_verdict
from xrl.rewards.values import NotCarried, from_json, to_json
from xrl.types import Prompt, Verdict

# Of the sentence that says why a judge did not start.
MAX_ERROR_CHARS = 2000

_START = {"error": (str,), "checks_truths": (bool,)}
_VERDICT = {
    "number": (int,),
    "reward": (int, float, type(None)),
    "failure": (str,),
    "detail": (str,),
    "location": (str,),
}
_END = {"code": (int, type(None)), "failure": (str,), "detail": (str,)}


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a judge's process says first."""

    error: str  # why it did not start; empty: it is ready
    checks_truths: bool  # whether the judge has a `check_truth`


@dataclass(frozen=True, kw_only=True)
class End:
    """How a judge's process ended, as its keeper says it."""

    code: int | None  # exit code, or minus the signal; None: it was still there
    failure: str  # the limit it went over; empty: none
    detail: str


def encode_prompt(prompt: Prompt) -> bytes:
    """The prompt's part of a question: once a prompt, as many answers share it.

    Raises:
        NotCarried: its `extra` holds a value of a type that cannot be sent, or is too large.
    """
    fields = {
        "id": prompt.id,
        "token_ids": prompt.token_ids,
        "text": prompt.text,
        "ground_truth": prompt.ground_truth,
        "data_source": prompt.data_source,
        "extra": to_json(prompt.extra),
    }
    encoded = _encode(fields)
    if len(encoded) > MAX_QUESTION_BYTES // 2:
        raise NotCarried(f"{len(encoded) / 1e6:.0f} MB, more than {MAX_QUESTION_BYTES / 2e6:.0f} MB")
    return encoded


def encode_question(number: int, response: str, prompt: bytes) -> bytes:
    """A question about an answer to a prompt that `encode_prompt` has encoded."""
    return b'{"number":%d,"response":%b,"prompt":%b}' % (number, _encode(response), prompt)


def decode_question(message: bytes) -> tuple[int, str, Prompt]:
    """Number, response and prompt, in the judge's process."""
    found = json.loads(message.decode("utf-8", "surrogatepass"))
    fields = found["prompt"]
    return found["number"], found["response"], Prompt(**{**fields, "extra": from_json(fields["extra"])})


def encode_start(start: Start) -> bytes:
    return json.dumps({"error": clean(start.error, MAX_ERROR_CHARS), "checks_truths": start.checks_truths}).encode()


def decode_start(message: bytes) -> Start:
    """
    Raises:
        BadMessage: it is of another schema.
    """
    found = _strict(message, _START)
    return Start(error=clean(found["error"], MAX_ERROR_CHARS), checks_truths=found["checks_truths"])


def encode_verdict(number: int, verdict: Verdict) -> bytes:
    return json.dumps(
        {
            "number": number,
            "reward": verdict.reward,
            "failure": verdict.failure,
            "detail": verdict.detail,
            "location": verdict.location,
        }
    ).encode()


def decode_verdict(message: bytes, number: int) -> Verdict:
    """The verdict on question `number`.

    Raises:
        BadMessage: it is of another schema, on another question, or no verdict, as a reward beyond MAX_REWARD is.
    """
    found = _strict(message, _VERDICT)
    if found["number"] != number:
        raise BadMessage(f"it answered question {clean(str(found['number']), 20)} and was asked question {number}")
    reward = found["reward"]
    if (reward is None) != bool(found["failure"]):
        raise BadMessage("it gave both a reward and a failure, or neither")
    if reward is None:
        return failed_verdict(found["failure"], found["detail"], found["location"])
    if not abs(reward) <= MAX_REWARD:  # so is NaN refused
        raise BadMessage(f"it gave a reward that is not between -{MAX_REWARD:,.0f} and {MAX_REWARD:,.0f}")
    return Verdict(reward=float(reward))


def encode_end(end: End) -> bytes:
    return json.dumps({"code": end.code, "failure": end.failure, "detail": end.detail}).encode()


def decode_end(message: bytes) -> End:
    """
    Raises:
        BadMessage: it is of another schema.
    """
    return End(**_strict(message, _END))


def _encode(value: object) -> bytes:
    return _ENCODER.encode(value).encode("utf-8", "surrogatepass")


def _strict(message: bytes, schema: Mapping[str, tuple[type, ...]]) -> dict[str, Any]:
    """A JSON object with exactly the keys of `schema`, each of one of its types."""
    try:
        found = _DECODER.decode(message.decode())
    except (ValueError, RecursionError) as error:
        raise BadMessage("what it wrote is not JSON") from error
    if type(found) is not dict or found.keys() != schema.keys():
        raise BadMessage("what it wrote is not a JSON object with the keys of an answer")
    for name, kinds in schema.items():
        if type(found[name]) not in kinds:
            raise BadMessage(f"`{name}` of what it wrote is a {type(found[name]).__name__}")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


# Made once: `json.dumps` and `json.loads` with options make one a call.
# Half characters as they are: as `\ud83d\ude00` two halves would come back as one character.
_ENCODER = json.JSONEncoder(ensure_ascii=False)
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
