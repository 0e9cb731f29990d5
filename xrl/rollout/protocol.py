"""What goes over HTTP between the trainer and a rollout worker.

`/generate` takes LMDeploy's native schema and answers in it; `n`, `seed`, `request_id`, `first_sample`, `num_drawn` and
`as_arrays` are ours: with `n` the answer is a list, and with `as_arrays`, which trainers ask for, it is what
`completions_to_bytes` makes of it. Weights are announced under /xrl/v1/ and travel as xrl.weights.transport says. Each
call shows what xrl.rollout.access says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from xrl.rollout.engine import MAX_STOP_TOKENS, ORDINALS
from xrl.rollout.fields import INT64, float_of, int_of, ints_of, text_of
from xrl.types import Completion, GenerateRequest, SamplingParams

GENERATE = "/generate"
ABORT = "/abort_request"
HEALTH = "/health"
SLEEP = "/sleep"
WAKE = "/wakeup"
CONNECT = "/xrl/v1/connect"
LOAD_PART = "/xrl/v1/load_part"
FINISH_UPDATE = "/xrl/v1/finish_update"
LEASE = "/xrl/v1/lease"
SHUTDOWN = "/xrl/v1/shutdown"

# The content type of completions as arrays.
ARRAYS = "application/x-xrl-completions"
# In front of them: how many bytes of JSON come next, little-endian.
LENGTH_BYTES = 4
# What they hold, little-endian.
TOKEN_ID, LOGPROB = "<i4", "<f4"
BYTES_OF_TOKEN = 8  # one of each

# Longest name of a request.
MAX_ID_LENGTH = 200
# A version of weights; every run counts its own from 0.
VERSIONS = range(2**53)


def request_to_json(request: GenerateRequest) -> dict[str, Any]:
    """The body of a `/generate` call."""
    sampling = request.sampling
    return {
        "request_id": request.id,
        "input_ids": list(request.token_ids),
        "n": request.num_samples,
        "first_sample": request.first_sample,
        "num_drawn": request.num_drawn,
        "return_logprob": True,
        "max_tokens": sampling.max_new_tokens,
        "stop_token_ids": list(sampling.stop_token_ids),
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "include_stop_str_in_output": True,
        "as_arrays": True,
    }


def request_from_json(
    body: Mapping[str, Any], *, default_id: str, max_samples: int, max_prompt_length: int
) -> GenerateRequest:
    """The request a `/generate` body describes.

    Args:
        max_samples: most answers of one request.
        max_prompt_length: most tokens of a prompt.

    Raises:
        ValueError: something is missing, of the wrong type or out of range; names the field and what was found.
    """
    return GenerateRequest(
        id=text_of(body, "request_id", longest=MAX_ID_LENGTH, default=default_id),
        token_ids=ints_of(body.get("input_ids"), "input_ids", most=max_prompt_length, within=INT64),
        num_samples=int_of(body, "n", within=range(1, max_samples + 1), default=1),
        first_sample=int_of(body, "first_sample", within=ORDINALS, default=0),
        num_drawn=int_of(body, "num_drawn", within=range(max_prompt_length), default=0),
        sampling=SamplingParams(
            temperature=float_of(body, "temperature", low=0.0, high=1e9, default=1.0),
            top_k=int_of(body, "top_k", within=range(2**63), default=0),
            top_p=float_of(body, "top_p", low=0.0, high=1.0, default=1.0),
            max_new_tokens=int_of(body, "max_tokens", within=range(1, 2**63), default=512),
            stop_token_ids=tuple(
                ints_of(body.get("stop_token_ids") or [], "stop_token_ids", most=MAX_STOP_TOKENS, within=INT64)
            ),
            seed=int_of(body, "seed", within=INT64, default=0),
        ),
    )


def completion_to_json(completion: Completion, *, num_prompt_tokens: int, run_id: str | None) -> dict[str, Any]:
    """One answer, as LMDeploy returns it.

    Args:
        run_id: of the run whose weights sampled it; the version alone could be any run's.
    """
    token_ids = completion.token_ids.tolist()
    return {
        "output_ids": token_ids,
        "meta_info": {
            **_meta_info(completion, num_prompt_tokens, run_id),
            "output_token_logprobs": list(zip(completion.logprobs.tolist(), token_ids, strict=True)),
        },
    }


def completions_to_bytes(completions: Sequence[Completion], *, num_prompt_tokens: int, run_id: str | None) -> bytes:
    """The answers to one request, each token as 8 bytes.

    The length of the header; the header, a JSON list of each answer's `meta_info`; the ids of all answers, one answer
    after the other; their log-probs in the same order. Arguments as of `completion_to_json`.
    """
    header = json.dumps([_meta_info(each, num_prompt_tokens, run_id) for each in completions]).encode()
    return b"".join(
        [
            len(header).to_bytes(LENGTH_BYTES, "little"),
            header,
            *(each.token_ids.astype(TOKEN_ID, copy=False).tobytes() for each in completions),
            *(each.logprobs.astype(LOGPROB, copy=False).tobytes() for each in completions),
        ]
    )


def _meta_info(completion: Completion, num_prompt_tokens: int, run_id: str | None) -> dict[str, Any]:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": len(completion.token_ids),
        "finish_reason": {"type": completion.finish_reason},
        "weights_version": completion.weights_version,
        "weights_run": run_id,
    }
