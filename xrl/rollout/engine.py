"""What every rollout engine can do, whoever hosts it. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from xrl.config.rollout import TEMPERATURES
from xrl.types import Completion, GenerateRequest, WeightBucket

if TYPE_CHECKING:
    from torch import Tensor


class EngineError(RuntimeError):
    """An engine could not do what it was asked."""


class EngineNotReady(EngineError):
    """Generation was asked of an engine that has no complete weights, is asleep or is being updated."""


class EngineBusy(EngineError):
    """What needs an idle engine was asked of one with requests in flight."""


class WrongWeights(EngineError):
    """Tensors that the engine's model does not have, or of other sizes, or too few of them."""


# Most stop tokens of a request; models have a handful.
MAX_STOP_TOKENS = 1024
_INT64 = range(-(2**63), 2**63)
# Ordinals of samples within their group.
ORDINALS = range(2**31)


def check_request(request: GenerateRequest, *, vocab_size: int, max_model_len: int) -> None:
    """Refuse what no engine can run: what passes must not fail in a step, where other requests are.

    Raises:
        ValueError: names the request, what is wrong and what was needed.
    """
    where, sampling = f"request {request.id!r}", request.sampling
    if not request.token_ids:
        raise ValueError(f"{where}: the prompt must hold at least one token, got none")
    if request.num_samples < 1 or sampling.max_new_tokens < 1:
        raise ValueError(
            f"{where}: num_samples and max_new_tokens must be >= 1, "
            f"got {request.num_samples} and {sampling.max_new_tokens}"
        )
    if request.first_sample not in ORDINALS or request.first_sample + request.num_samples - 1 not in ORDINALS:
        raise ValueError(
            f"{where}: samples must have ordinals in [0, {ORDINALS.stop - 1}], "
            f"got first_sample {request.first_sample} and num_samples {request.num_samples}"
        )
    if not 0 <= request.num_drawn < len(request.token_ids):
        raise ValueError(
            f"{where}: num_drawn must be in [0, {len(request.token_ids) - 1}], as the prompt holds at least one of the "
            f"{len(request.token_ids)} tokens, got {request.num_drawn}"
        )
    total = len(request.token_ids) + sampling.max_new_tokens
    if total > max_model_len:
        raise ValueError(
            f"{where}: prompt ({len(request.token_ids)}) + max_new_tokens ({sampling.max_new_tokens}) = {total} "
            f"tokens exceed max_model_len {max_model_len}"
        )
    if min(request.token_ids) < 0 or max(request.token_ids) >= vocab_size:
        raise ValueError(f"{where}: token ids must be in [0, {vocab_size}), the prompt holds others")
    low, high = TEMPERATURES
    # Not a number is none of these either.
    if not ((sampling.temperature == 0 or low <= sampling.temperature <= high) and 0 < sampling.top_p <= 1):
        raise ValueError(
            f"{where}: temperature must be 0 or in [{low:g}, {high:g}] and top_p in (0, 1], "
            f"got {sampling.temperature:g} and {sampling.top_p:g}"
        )
    if sampling.top_k < 0 or sampling.top_k not in _INT64 or sampling.seed not in _INT64:
        raise ValueError(f"{where}: top_k must be >= 0, and top_k and seed must be integers of 64 bits")
    if len(sampling.stop_token_ids) > MAX_STOP_TOKENS:
        raise ValueError(f"{where}: at most {MAX_STOP_TOKENS} stop tokens, got {len(sampling.stop_token_ids)}")


def check_completion(completion: Completion) -> None:
    """Refuse what cannot be sent.

    Raises:
        EngineError: token ids and log-probs are not arrays of their types, or not one log-prob a token.
    """
    for name, kind in (("token_ids", "int32"), ("logprobs", "float32")):
        found = getattr(getattr(completion, name), "dtype", type(getattr(completion, name)).__name__)
        if found != kind:
            raise EngineError(f"the engine's {name} are {found}, not a numpy array of {kind}")
    if completion.token_ids.ndim != 1 or completion.token_ids.shape != completion.logprobs.shape:
        raise EngineError(
            f"the engine's token_ids and logprobs are {list(completion.token_ids.shape)} and "
            f"{list(completion.logprobs.shape)}, not one of each for every token"
        )


@runtime_checkable
class HasDestinations(Protocol):
    """What an engine may offer beside the contract: its own memory, to which bytes are copied as they are checked.

    One pass over them instead of two. Only of use to engines that keep weights in the form in which they arrive.
    """

    def destinations(self, part: str) -> Mapping[str, Tensor]:
        """The engine's own memory for tensors of a part of the model: name -> contiguous tensor. May be empty.

        It is written to from then on, so the engine cannot generate until an update is complete. When the bytes are
        those that were sent, `load_part` comes, with those of these tensors that fitted among the bucket's: they are
        already in place. When they are not, the destinations are asked for again, or the update ends there.

        Raises:
            EngineBusy: requests are in flight.
        """
        ...


class Engine(Protocol):
    """Samples completions, and takes new weights one part of the model at a time.

    One update: `load_part` once for each bucket, in any order, then `finish_update`. An engine starts without
    weights, so the first update comes before the first request. All methods may be called from any thread.
    """

    weights_version: int  # of the weights that sample from here on; -1 before the first update

    def submit(self, request: GenerateRequest) -> Future[list[Completion]]:
        """Queue a request; the future holds its num_samples completions, in order.

        A completion ends with its first stop token (finish_reason "stop"), or has max_new_tokens ("length"). Token ids
        are in [0, vocab_size), log-probs finite and <= 0: the trainer refuses others (xrl/rollout/answers.py).

        Raises:
            ValueError: the request can never run (empty prompt, prompt + max_new_tokens over max_model_len, ...).
            EngineNotReady: there are no complete weights, the engine sleeps or an update is under way.
        """
        ...

    def abort(self, request_id: str | None = None) -> None:
        """End a request, or all (None): unfinished completions come back as they are, with finish_reason "abort"."""
        ...

    def sleep(self, *, keep_weights: bool = True) -> None:
        """Free the device's memory: the KV cache, and the weights, where that pays. Updates go on.

        Args:
            keep_weights: the weights sample again after `wake`; False allows to drop them, then an update must come
                before the next request.

        Raises:
            EngineError: requests are in flight, or the engine cannot keep the weights.
        """
        ...

    def wake(self) -> None:
        """Take requests again after `sleep`: the KV cache comes back, so memory for it must be free by now."""
        ...

    def load_part(self, bucket: WeightBucket) -> None:
        """Take the whole tensors of one part: a decoder layer, the embeddings, or the final norm and head.

        Raises:
            EngineBusy: requests are in flight.
            WrongWeights: a tensor is unknown or of the wrong shape.
        """
        ...

    def finish_update(self, version: int) -> None:
        """All parts are loaded: completions sampled from here on carry this version.

        Raises:
            WrongWeights: tensors are missing; the message names them.
        """
        ...

    def close(self) -> None:
        """Abort what is in flight and free everything; the engine cannot be used again."""
        ...
