"""What rollout workers answer, checked before anything of it is used. The one place where that is done.

A worker may run on another host, behind a proxy, with other code, or on broken memory; what listens at its address may
be no worker at all. So nothing it says is taken on trust: bytes are counted before they are parsed, and every field
that is read is of its type and within its range. What is not is a `WorkerFault`, which names the worker and the field;
the same question then goes to another worker.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import aiohttp
import numpy as np

from xrl.launch.exit import RunFailed
from xrl.launch.terminal import printable
from xrl.rollout.protocol import ARRAYS, BYTES_OF_TOKEN, LENGTH_BYTES, LOGPROB, TOKEN_ID
from xrl.types import Completion, FinishReason, GenerateRequest

if TYPE_CHECKING:
    from xrl.rollout.process import WorkerHandle
    from xrl.types import FloatArray, IntArray

# Of every answer but completions: a few fields, or a sentence about an error.
SMALL_ANSWER_BYTES = 1 << 20
# A token comes as an id, and again beside its log-prob: 2 ids of 20 digits and a number of 25, with what is between.
BYTES_PER_TOKEN = 128
BYTES_PER_COMPLETION = 4096
# Log-probs are <= 0 but for rounding: the log of a probability that is 1 ulp over 1 is 1e-7 in fp32, 5e-4 in fp16.
HIGHEST_LOGPROB = 1e-3
# No sampler draws a token of probability exp(-100,000), and the sum of a million of these is finite in fp32.
LOWEST_LOGPROB = -1e5
# Of an error that a worker reports.
SENTENCE_LENGTH = 500
# Of an answer that another run's weights have sampled, whatever that run counted.
FOREIGN_VERSION = -2
FINISH_REASONS: tuple[str, ...] = get_args(FinishReason)
_MISSING = object()
_LOGPROBS = "meta_info.output_token_logprobs"


class WorkerError(RunFailed):
    """What is wrong with one worker: `detail` without its name, the message with it."""

    def __init__(self, worker: str, detail: str) -> None:
        super().__init__(f"{worker}: {detail}")
        self.detail = detail


class WorkerFault(WorkerError):
    """A worker's answer is not what was asked for: nothing of it is used."""


class WorkerRefused(WorkerError):
    """A worker says that it cannot do what it was asked."""


class StaleAnswer(RuntimeError):
    """An answer was sampled with other weights than the rollout's."""

    def __init__(self, versions: Sequence[int], expected: WeightsId) -> None:
        super().__init__(f"sampled with {whose_weights(versions)}, not version {expected.version} of this run")
        self.versions = versions


@dataclass(frozen=True, kw_only=True)
class WeightsId:
    """Which weights an answer is to be sampled with. Every run counts its versions from 0."""

    run_id: str
    version: int


def whose_weights(versions: Sequence[int]) -> str:
    """Versions that stale answers carry, in words."""
    if FOREIGN_VERSION in versions:
        return "another run's weights"
    return f"weights version {', '.join(map(str, versions))}"


def name_of(worker: WorkerHandle) -> str:
    """A worker's name in sentences: "rollout worker 1 (10.0.0.2:8000)"."""
    address = worker.url.removeprefix("http://")
    return f"rollout worker {worker.number} ({address})" if address else f"rollout worker {worker.number}"


def completions_limit(request: GenerateRequest) -> int:
    """Most bytes that the answer to a request can have."""
    return SMALL_ANSWER_BYTES + request.num_samples * (
        BYTES_PER_COMPLETION + request.sampling.max_new_tokens * BYTES_PER_TOKEN
    )


async def read_answer(response: aiohttp.ClientResponse, *, limit_bytes: int, worker: str) -> object:
    """The body of a worker's answer: parsed where it is JSON, as bytes where it says that it is arrays.

    Args:
        limit_bytes: no more are read.

    Raises:
        WorkerFault: it is longer, compressed, or neither.
    """
    where = f"{response.url.path}: the answer (status {response.status})"
    if response.content_type not in ("application/json", ARRAYS):
        raise WorkerFault(worker, f"{where} is {shown(response.content_type)}, not application/json")
    # A few compressed kilobytes can be gigabytes.
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise WorkerFault(worker, f"{where} is compressed, which nobody asked for")
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > limit_bytes:
            raise WorkerFault(worker, f"{where} is longer than {limit_bytes:,} bytes")
    return body if response.content_type == ARRAYS else parse_json(body, worker=worker, where=where)


def parse_json(body: bytes | bytearray, *, worker: str, where: str) -> object:
    """Raises WorkerFault where it is no JSON, or none that anybody means: nested without end, a key said twice."""
    try:
        return json.loads(body, object_pairs_hook=_object_of)
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else printable(str(error))[:SENTENCE_LENGTH]
        raise WorkerFault(worker, f"{where} is no JSON: {reason}") from error


def checked_completions(
    answer: object, request: GenerateRequest, *, worker: str, vocab_size: int, weights: WeightsId | None
) -> list[Completion]:
    """The completions of a `/generate` call with `n`: one for each sample, each as the request allows.

    Args:
        answer: the parsed body, or the bytes of arrays.
        worker: its name in errors.
        vocab_size: ids are in [0, vocab_size).
        weights: those that are to have sampled it; None: any.

    Raises:
        WorkerFault: names the field.
        StaleAnswer: all is well but for the weights.
    """
    if isinstance(answer, bytes | bytearray):
        answers = _split(answer, request, worker)
    else:
        answers = _listed(answer, request, worker)
    completions = []
    for number, fields in enumerate(answers, start=1):
        try:
            completions.append(_completion(fields, request, vocab_size, weights))
        except _Wrong as error:
            raise WorkerFault(worker, f"completion {number} of {len(answers)}: {error}") from error
    if weights is not None and any(completion.weights_version != weights.version for completion in completions):
        raise StaleAnswer(sorted({completion.weights_version for completion in completions}), weights)
    return completions


def checked_checksum(answer: object, *, worker: str) -> str:
    """The checksum, right or wrong, that a worker reports of a bucket. Raises WorkerFault."""
    checksum = _field_of(answer, "checksum", worker)
    if not isinstance(checksum, str) or len(checksum) != 16 or not set(checksum) <= set("0123456789abcdef"):
        raise WorkerFault(worker, f"checksum is {shown(checksum)}, not 16 hexadecimal digits")
    return checksum


def check_updated(answer: object, weights: WeightsId, *, worker: str) -> None:
    """A worker has finished the update. Raises WorkerFault where it says that it has other weights."""
    version = _field_of(answer, "weights_version", worker)
    if type(version) is not int or version != weights.version:
        raise WorkerFault(worker, f"weights_version is {shown(version)} after the update to {weights.version}")
    run_id = _field_of(answer, "weights_run", worker)
    if run_id != weights.run_id:
        raise WorkerFault(worker, f"weights_run is {shown(run_id)} after an update of run {weights.run_id}")


def check_done(answer: object, *, worker: str) -> None:
    """A worker has done what it was told, and has no more to say. Raises WorkerFault for anything but an object."""
    if not isinstance(answer, dict):
        raise WorkerFault(worker, f"the answer is {shown(answer)}, not a JSON object")


def checked_refusal(answer: object, *, worker: str) -> tuple[str, str]:
    """The class and the sentence of an error that a worker reports. Raises WorkerFault."""
    kind, sentence = _field_of(answer, "type", worker), _field_of(answer, "error", worker)
    if not isinstance(kind, str) or not isinstance(sentence, str):
        raise WorkerFault(worker, f"type and error are {shown(kind)} and {shown(sentence)}, not text")
    return printable(kind)[:SENTENCE_LENGTH], printable(" ".join(sentence.split()))[:SENTENCE_LENGTH]


def checked_max_requests(answer: object, *, worker: str) -> int:
    """Requests that a worker takes at once, out of what it says of its health or at its start. Raises WorkerFault."""
    return _int_of(answer, "max_requests", worker, lowest=1, highest=2**31)


def checked_port(answer: object, *, worker: str) -> int:
    """Where a worker listens, out of what it says at its start. Raises WorkerFault."""
    return _int_of(answer, "port", worker, lowest=1, highest=65535)


def shown(value: object) -> str:
    """A foreign value in a sentence of ours: short, and without anything that a terminal would obey."""
    return printable(reprlib.repr(value))


class _Wrong(ValueError):
    """What is wrong with a completion, the field first."""


@dataclass(frozen=True, kw_only=True, eq=False)
class _Arrays:
    """What came of a completion as arrays, of one length."""

    meta: dict[str, Any]
    ids: IntArray
    logprobs: FloatArray


def _listed(answer: object, request: GenerateRequest, worker: str) -> list[Any]:
    if not isinstance(answer, list):
        raise WorkerFault(worker, f"the answer is {shown(answer)}, not a list of {request.num_samples} completions")
    if len(answer) != request.num_samples:
        raise WorkerFault(worker, f"the answer holds {len(answer)} completions, not {request.num_samples} as asked for")
    return answer


def _split(body: bytes | bytearray, request: GenerateRequest, worker: str) -> list[_Arrays]:
    """Cut an answer up by what its header says. No array is looked at, or made, before all lengths are known to fit."""
    start = LENGTH_BYTES + int.from_bytes(body[:LENGTH_BYTES], "little")
    longest = LENGTH_BYTES + request.num_samples * BYTES_PER_COMPLETION
    if start > min(len(body), longest):
        raise WorkerFault(
            worker,
            f"the answer has {len(body):,} bytes and its header, by its own word, {start - LENGTH_BYTES:,}: "
            f"at most {longest - LENGTH_BYTES:,} are taken",
        )
    header = _listed(parse_json(body[LENGTH_BYTES:start], worker=worker, where="the header"), request, worker)
    metas, lengths = [], []
    for number, meta in enumerate(header, start=1):
        try:
            metas.append(_object(meta, "meta_info"))
            lengths.append(_num_tokens(metas[-1], request.sampling.max_new_tokens))
        except _Wrong as error:
            raise WorkerFault(worker, f"completion {number} of {len(header)}: {error}") from error
    total = sum(lengths)
    if len(body) - start != total * BYTES_OF_TOKEN:
        raise WorkerFault(
            worker,
            f"the answer holds {len(body) - start:,} bytes of tokens, and meta_info.completion_tokens say "
            f"{total * BYTES_OF_TOKEN:,}",
        )
    # Copies: the bytes may begin anywhere, and need not stay.
    ids = np.frombuffer(body, TOKEN_ID, total, start).astype(np.int32)
    logprobs = np.frombuffer(body, LOGPROB, total, start + ids.nbytes).astype(np.float32)
    borders = np.cumsum(lengths)[:-1]
    parts = zip(metas, np.split(ids, borders), np.split(logprobs, borders), strict=True)
    return [_Arrays(meta=meta, ids=own_ids, logprobs=own_logprobs) for meta, own_ids, own_logprobs in parts]


def _completion(answer: object, request: GenerateRequest, vocab_size: int, weights: WeightsId | None) -> Completion:
    """Every check looks at all tokens at once: the one that is wrong is looked for when there is one."""
    if isinstance(answer, _Arrays):
        meta, ids, logprobs = answer.meta, answer.ids, answer.logprobs
        _check_arrays(ids, logprobs, vocab_size)
        reason = _finish_reason(meta, ids, request)
    else:
        meta = _object(_get(_object(answer, "it"), "meta_info"), "meta_info")
        listed = _ids(_get(answer, "output_ids"), request.sampling.max_new_tokens, vocab_size)
        ids = np.array(listed, np.int32)
        reason = _finish_reason(meta, ids, request)
        logprobs = _logprobs(_get(meta, "output_token_logprobs", "meta_info."), listed)
    for name, number in (("prompt_tokens", len(request.token_ids)), ("completion_tokens", len(ids))):
        found = _get(meta, name, "meta_info.")
        if type(found) is not int or found != number:
            raise _Wrong(f"meta_info.{name} is {shown(found)}, not {number}")
    version = _get(meta, "weights_version", "meta_info.")
    if type(version) is not int or not -1 <= version < 2**63:
        raise _Wrong(f"meta_info.weights_version is {shown(version)}, not a version")
    run_id = _get(meta, "weights_run", "meta_info.")
    if run_id is not None and not isinstance(run_id, str):
        raise _Wrong(f"meta_info.weights_run is {shown(run_id)}, not the name of a run")
    if weights is not None and run_id != weights.run_id:
        version = FOREIGN_VERSION
    return Completion(token_ids=ids, logprobs=logprobs, finish_reason=reason, weights_version=version)


def _num_tokens(meta: dict[str, Any], longest: int) -> int:
    number = _get(meta, "completion_tokens", "meta_info.")
    if type(number) is not int or not 0 <= number <= longest:
        raise _Wrong(
            f"meta_info.completion_tokens is {shown(number)}, not a number of tokens up to the {longest} asked for"
        )
    return number


def _check_arrays(ids: IntArray, logprobs: FloatArray, vocab_size: int) -> None:
    if not ids.size:
        return
    if ids.min() < 0 or ids.max() >= vocab_size:
        index = int(np.argmax((ids < 0) | (ids >= vocab_size)))
        raise _Wrong(f"output_ids[{index}] is {ids[index]}, not a token of the model ({vocab_size})")
    if not (logprobs.min() >= LOWEST_LOGPROB and logprobs.max() <= HIGHEST_LOGPROB):  # NaN is neither
        index = int(np.argmin((logprobs >= LOWEST_LOGPROB) & (logprobs <= HIGHEST_LOGPROB)))
        raise _Wrong(f"{_LOGPROBS}[{index}] has log-prob {logprobs[index]:g}, not a finite number <= 0")


def _finish_reason(meta: dict[str, Any], ids: IntArray, request: GenerateRequest) -> FinishReason:
    """Why it ended, which its tokens must bear out: who learns from an answer takes it for whole by this word."""
    where = "meta_info.finish_reason"
    reason = _get(_object(_get(meta, "finish_reason", "meta_info."), where), "type", f"{where}.")
    if not isinstance(reason, str) or reason not in FINISH_REASONS:
        raise _Wrong(f"{where}.type is {shown(reason)}, not one of {', '.join(FINISH_REASONS)}")
    longest = request.sampling.max_new_tokens
    is_stop = np.isin(ids, np.array(request.sampling.stop_token_ids, np.int64))
    if is_stop[:-1].any():
        index = int(np.argmax(is_stop))
        raise _Wrong(f"output_ids[{index}] is the stop token {ids[index]}, and the answer goes on after it")
    ends_with_stop = bool(is_stop[-1:].any())
    if reason == "stop" and not ends_with_stop:
        last = f"output_ids ends with {ids[-1]}" if ids.size else "output_ids is empty"
        raise _Wrong(f"{where}.type is 'stop', but {last}, no stop token of the request")
    if reason == "length" and len(ids) != longest:
        raise _Wrong(f"{where}.type is 'length', but output_ids holds {len(ids)} of {longest} tokens")
    if reason == "abort" and ids.size:  # it may have been whole when it was told to end: nothing goes on after it
        if ends_with_stop:
            return "stop"
        if len(ids) == longest:
            return "length"
    return reason  # type: ignore[return-value]


def _ids(ids: object, longest: int, vocab_size: int) -> list[int]:
    if not isinstance(ids, list):
        raise _Wrong(f"output_ids is {shown(ids)}, not a list of token ids")
    if len(ids) > longest:
        raise _Wrong(f"output_ids holds {len(ids)} tokens, more than the {longest} asked for")
    # A bool is an int to isinstance, and 3.0 is equal to 3.
    if ids and (set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) >= vocab_size):
        index = next(n for n, token in enumerate(ids) if type(token) is not int or not 0 <= token < vocab_size)
        raise _Wrong(f"output_ids[{index}] is {shown(ids[index])}, not a token of the model ({vocab_size})")
    return ids


def _logprobs(pairs: object, ids: list[int]) -> FloatArray:
    where = _LOGPROBS
    if not isinstance(pairs, list):
        raise _Wrong(f"{where} is {shown(pairs)}, not a list of [log-prob, id]")
    if len(pairs) != len(ids):
        raise _Wrong(f"{where} holds {len(pairs)} log-probs of {len(ids)} tokens")
    if not ids:
        return np.zeros(0, np.float32)
    try:
        values, of_ids = zip(*pairs, strict=True)
    except (TypeError, ValueError) as error:
        raise _Wrong(f"{where} does not hold pairs [log-prob, id] alone") from error
    if set(map(type, of_ids)) != {int} or list(of_ids) != ids:
        index = next(n for n, pair in enumerate(zip(of_ids, ids, strict=True)) if not _same(*pair))
        raise _Wrong(f"{where}[{index}] is of token {shown(of_ids[index])}, output_ids[{index}] is {ids[index]}")
    # Where NaN is among them, the least and the largest depend on their order; the sum is NaN in any.
    kinds = set(map(type, values))
    if (
        not kinds <= {float, int}  # a writer may shorten 0.0 to 0
        or min(values) < LOWEST_LOGPROB
        or max(values) > HIGHEST_LOGPROB
        or not math.isfinite(sum(values))
    ):
        index = next(n for n, value in enumerate(values) if not _is_logprob(value))
        raise _Wrong(f"{where}[{index}] has log-prob {shown(values[index])}, not a finite number <= 0")
    return np.array(values, np.float32)


def _same(of_id: object, token: int) -> bool:
    return type(of_id) is int and of_id == token


def _is_logprob(value: object) -> bool:
    return type(value) in (float, int) and LOWEST_LOGPROB <= value <= HIGHEST_LOGPROB  # type: ignore[operator]


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Wrong(f"{where} is {shown(value)}, not a JSON object")
    return value


def _get(fields: Any, name: str, where: str = "") -> Any:
    value = fields.get(name, _MISSING)
    if value is _MISSING:
        raise _Wrong(f"{where}{name} is missing")
    return value


def _field_of(answer: object, name: str, worker: str) -> Any:
    try:
        return _get(_object(answer, "the answer"), name)
    except _Wrong as error:
        raise WorkerFault(worker, str(error)) from error


def _int_of(answer: object, name: str, worker: str, *, lowest: int, highest: int) -> int:
    value = _field_of(answer, name, worker)
    if type(value) is not int or not lowest <= value <= highest:
        raise WorkerFault(worker, f"{name} is {shown(value)}, not a number from {lowest} to {highest}")
    return value


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a key that is said twice, readers take one or the other."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a key is said twice")
    return fields
