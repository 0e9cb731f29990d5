"""LMDeploy's TurboMind in this process: every step that depends on LMDeploy's insides, for the versions it holds for.

An update of the weights, as the compiled part wants it:

    sleep(2)             weights and KV cache are freed
    wakeup(weights)      room for weights, uninitialised
    _export_iter dropped see `begin_update`
    update_params        once a decoder layer, then what is outside the layers; with finished=True the compiled part
                         transforms the weights in place, after which they cannot be written any more
    wakeup(kv_cache)     the engine is built anew, with a cache; request handles from before are dead

`sleep` by itself gives the cache back to CUDA one sleep late: see `_frees_completed`.

The compiled part ends the process where it is used out of this order, so `TurboMindEngine` keeps the states.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import sys
import threading
from collections.abc import Awaitable, Iterator, Mapping
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from xrl.config import SettingsError
from xrl.rollout.engine import EngineError
from xrl.types import SamplingParams

# Where the update cycle above was read in the source and run, call by call.
SUPPORTED_VERSIONS = ("0.12.3", "0.13.0")
INSTALL_HINT = "see docs/turbomind.md for an environment with all it needs"
# By LMDeploy, where it does not find `num_experts`: transformers 5 calls it `num_local_experts`.
EXPERTS_ASSUMED = 128
# Of the device memory that is free when the cache is built.
CACHE_SHARE = 0.8
# What goes beyond is cut off in silence, or refused by an assertion.
MAX_STOP_TOKENS = 32
MAX_TOP_K = 1024
MAX_TEMPERATURE = 2.0
SYNCHRONIZE_TIMEOUT_S = 30.0  # a device that does not answer for so long is put to sleep all the same

WEIGHTS, KV_CACHE = "weights", "kv_cache"


def check_version() -> None:
    """Refuse any LMDeploy but those whose insides are known, before importing it.

    Raises:
        SettingsError: it is not installed, or of another version; the message says why that matters.
    """
    try:
        found = metadata.version("lmdeploy")
    except metadata.PackageNotFoundError as error:
        raise SettingsError(
            f"engine turbomind: lmdeploy is not installed for {sys.executable}: {INSTALL_HINT}"
        ) from error
    if found.partition("+")[0] in SUPPORTED_VERSIONS:
        return
    release = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    why = (
        "from 0.14.0 on TurboMind cannot take new weights, its update_params reads a queue that nothing creates"
        if release >= (0, 14)
        else "the update of weights is driven through TurboMind's insides, and was proven with these versions only"
    )
    raise SettingsError(f"engine turbomind needs lmdeploy {' or '.join(SUPPORTED_VERSIONS)}, found {found}: {why}")


def check_experts(num_experts: int) -> None:
    """Refuse a mixture of experts that LMDeploy would take for another.

    Raises:
        SettingsError: transformers is too new.
    """
    found = metadata.version("transformers")
    if int(found.partition(".")[0]) >= 5 and num_experts != EXPERTS_ASSUMED:
        raise SettingsError(
            f"engine turbomind: LMDeploy does not find the number of experts in configs of transformers {found}, and "
            f"takes it for {EXPERTS_ASSUMED}, found {num_experts}: install transformers<5 in its environment"
        )


class TurboMindDriver:
    """One TurboMind on one device. Changes of its state come from one thread at a time."""

    final_norm = "norm.weight"  # as TurboMind calls it

    def __init__(
        self, model_dir: Path, *, dtype: str, device_index: int, max_batch_size: int, max_model_len: int
    ) -> None:
        """Load the checkpoint: TurboMind starts no other way that leads to `sleep`.

        Raises:
            SettingsError: LMDeploy is missing, of another version, cannot be loaded, or cannot run this model.
        """
        self._device_index = device_index
        self._start(model_dir, dtype, device_index, max_batch_size, max_model_len)
        self._taken: dict[str, set[str]] = {}  # part of the model -> TurboMind's names of what came with it

    def _start(self, model_dir: Path, dtype: str, device_index: int, max_batch_size: int, max_model_len: int) -> None:
        self._lmdeploy, turbomind, self._update_request = _import()
        torch.cuda.set_device(device_index)  # or LMDeploy's look at the current one would take memory of the first
        config = self._lmdeploy.TurbomindEngineConfig(
            dtype=dtype,
            model_format="hf",
            tp=1,
            devices=[device_index],
            session_len=max_model_len,
            max_batch_size=max_batch_size,
            cache_max_entry_count=CACHE_SHARE,
            enable_prefix_caching=False,
            quant_policy=0,
            empty_init=False,
            enable_metrics=False,
        )
        try:
            self._turbomind = turbomind.TurboMind(str(model_dir), engine_config=config)
        except Exception as error:  # whatever its converters raise
            raise SettingsError(
                f"{model_dir}: TurboMind cannot load it: {type(error).__name__}: {str(error) or 'it gave no reason'}"
            ) from error

    def sleep(self, level: Literal[1, 2]) -> None:
        """Free the cache, and move the weights to the host (1) or drop them (2). Only while there is a cache.

        No request may be in flight.
        """
        with _frees_completed(self._device_index):
            done = self._turbomind.sleep(level)
            if inspect.isawaitable(done):  # from 0.13.0 on
                asyncio.run(_finished(done))
        torch.cuda.empty_cache()

    def wake(self, *tags: str) -> None:
        """WEIGHTS: room for them, or what level 1 had moved away. KV_CACHE: the engine, with its cache."""
        self._turbomind.wakeup(list(tags))

    def begin_update(self) -> None:
        """Have the next tensors written to the weights as they are now: awake, and not yet transformed.

        TurboMind looks up the weights' addresses when it finds no `_export_iter`, and keeps them: without this,
        every update after the first is accepted and ignored.
        """
        self._forget_export()
        self._taken.clear()

    def take(self, part: str, tensors: Mapping[str, Tensor], *, finished: bool = False) -> None:
        """Copy the tensors of a whole decoder layer, or some from outside the layers. A part may come again.

        Args:
            tensors: by Hugging Face name, on any device; they may be overwritten afterwards.
            finished: these are the last ones: transform all weights into what the kernels read.

        Raises:
            EngineError: TurboMind failed, or took nothing.
        """
        names = self._turbomind._tm_model.tm_params
        if part in self._taken:  # crossed off: TurboMind would skip it
            weights = self._weights()
            names.update({name: [weights[name]] for name in self._taken.pop(part)})
        before = set(names)
        try:
            self._turbomind.update_params(
                self._update_request(serialized_named_tensors=dict(tensors), load_format=None, finished=finished)
            )
        except Exception as error:  # whatever its converters raise
            raise EngineError(f"weight update, {part}: TurboMind failed: {type(error).__name__}: {error}") from error
        if not self._taken:  # the first part: the names have just been looked up
            before = set(self._weights()) if names else set()
        taken = before - set(names)
        if not taken:
            raise EngineError(f"weight update, {part}: TurboMind took none of its {len(tensors)} tensors")
        self._taken[part] = taken
        if finished:
            self._forget_export()  # which holds the tensors of this call
            torch.cuda.empty_cache()

    def missing(self) -> list[str]:
        """What the update under way has not brought yet, by TurboMind's names."""
        return sorted(self._turbomind._tm_model.tm_params)

    def new_request(self) -> Any:
        """A handle for one request; it dies with the next `sleep`."""
        return self._turbomind.create_instance()

    def generation_config(self, sampling: SamplingParams, *, seed: int) -> Any:
        """LMDeploy's form of `sampling`, every field set: what is left out takes defaults that are not ours."""
        greedy = sampling.temperature == 0
        return self._lmdeploy.GenerationConfig(
            n=1,  # more is not implemented
            max_new_tokens=sampling.max_new_tokens,
            do_sample=not greedy,
            top_p=1.0 if greedy else sampling.top_p,
            top_k=1 if greedy else sampling.top_k,
            min_p=0.0,
            temperature=1.0 if greedy else sampling.temperature,
            repetition_penalty=1.0,
            ignore_eos=not sampling.stop_token_ids,
            random_seed=seed,
            stop_words=None,
            bad_words=None,
            stop_token_ids=list(sampling.stop_token_ids) or None,
            bad_token_ids=None,
            min_new_tokens=None,
            skip_special_tokens=False,
            spaces_between_special_tokens=True,
            logprobs=1,
            response_format=None,
            logits_processors=None,
            output_logits=None,
            output_last_hidden_state=None,
            include_stop_str_in_output=True,
            with_cache=False,
            preserve_cache=False,
            migration_request=None,
            return_routed_experts=False,
            repetition_ngram_size=0,
            repetition_ngram_threshold=0,
        )

    def close(self) -> None:
        """Free everything."""
        self._taken.clear()
        self._turbomind.close()

    def _weights(self) -> Mapping[str, Any]:
        return self._turbomind.model_comm.get_weights(0)

    def _forget_export(self) -> None:
        if hasattr(self._turbomind, "_export_iter"):
            del self._turbomind._export_iter


async def _finished(done: Awaitable[None]) -> None:
    await done


@contextlib.contextmanager
def _frees_completed(device_index: int) -> Iterator[None]:
    """Another thread waits for the device again and again, so that what is freed in stream order is seen to be free.

    TurboMind frees its cache in stream order, and trims its memory pool in the same breath: what nobody has waited for
    stays in the pool, out of reach for everybody else, until the next sleep. There is no place between the two calls,
    and the pool has no name by which it could be trimmed later.
    """
    stop, waiting = threading.Event(), threading.Event()

    def wait() -> None:
        try:
            torch.cuda.set_device(device_index)
            while not stop.is_set():
                torch.cuda.synchronize()
                waiting.set()
        finally:
            waiting.set()  # where the device fails, `sleep` says so

    thread = threading.Thread(target=wait, name="turbomind-frees", daemon=True)
    thread.start()
    waiting.wait(SYNCHRONIZE_TIMEOUT_S)
    try:
        yield
    finally:
        stop.set()
        thread.join(SYNCHRONIZE_TIMEOUT_S)


def _import() -> tuple[Any, Any, Any]:
    """`lmdeploy`, `lmdeploy.turbomind` and the class of a weight update."""
    check_version()
    try:
        lmdeploy = import_module("lmdeploy")
        turbomind = import_module("lmdeploy.turbomind")
        protocol = import_module("lmdeploy.serve.openai.protocol")
    except ImportError as error:
        raise SettingsError(f"engine turbomind: lmdeploy cannot be imported: {error}: {INSTALL_HINT}") from error
    logging.getLogger("lmdeploy").setLevel(logging.WARNING)  # it tells of every sample
    return lmdeploy, turbomind, protocol.UpdateParamsRequest
