"""What goes over HTTP between the trainer and a rollout worker.

`/generate` takes LMDeploy's native schema and answers in it; `n`, `seed` and `request_id` are ours: with `n` the
answer is a list. Weights are announced under /xrl/v1/ and travel as xrl.weights.transport says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from xrl.types import Completion, GenerateRequest, SamplingParams

GENERATE = "/generate"
ABORT = "/abort_request"
HEALTH = "/health"
SLEEP = "/sleep"
WAKE = "/wakeup"
CONNECT = "/xrl/v1/connect"
LOAD_LAYER = "/xrl/v1/load_layer"
FINISH_UPDATE = "/xrl/v1/finish_update"
SHUTDOWN = "/xrl/v1/shutdown"


def request_to_json(request: GenerateRequest) -> dict[str, Any]:
    """The body of a `/generate` call."""
    sampling = request.sampling
    return {
        "request_id": request.id,
        "input_ids": list(request.token_ids),
        "n": request.num_samples,
        "return_logprob": True,
        "max_tokens": sampling.max_new_tokens,
        "stop_token_ids": list(sampling.stop_token_ids),
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "seed": sampling.seed,
        "include_stop_str_in_output": True,
    }


def request_from_json(body: Mapping[str, Any], *, default_id: str) -> GenerateRequest:
    """The request a `/generate` body describes.

    Raises:
        ValueError: something is missing or of the wrong type.
    """
    ids = body.get("input_ids")
    if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
        raise ValueError("input_ids must be a list of token ids")
    return GenerateRequest(
        id=str(body.get("request_id", default_id)),
        token_ids=ids,
        num_samples=int(body.get("n", 1)),
        sampling=SamplingParams(
            temperature=float(body.get("temperature", 1.0)),
            top_k=int(body.get("top_k", 0)),
            top_p=float(body.get("top_p", 1.0)),
            max_new_tokens=int(body.get("max_tokens", 512)),
            stop_token_ids=tuple(body.get("stop_token_ids") or ()),
            seed=int(body.get("seed", 0)),
        ),
    )


def completion_to_json(completion: Completion, *, num_prompt_tokens: int) -> dict[str, Any]:
    """One answer, as LMDeploy returns it."""
    return {
        "output_ids": completion.token_ids,
        "meta_info": {
            "prompt_tokens": num_prompt_tokens,
            "completion_tokens": len(completion.token_ids),
            "finish_reason": {"type": completion.finish_reason},
            "output_token_logprobs": list(zip(completion.logprobs, completion.token_ids, strict=True)),
            "weights_version": completion.weights_version,
        },
    }
