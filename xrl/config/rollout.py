"""How answers are sampled, and by what."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from xrl.config.errors import SettingsError
from xrl.config.numbers import LONGEST_S, check_at_most, whole_number
from xrl.config.printable import shown

# How weights reach the workers (xrl/weights/transport); auto: through shared memory where all workers are on this host.
WEIGHT_TRANSPORTS = ("auto", "shared_memory", "cuda_ipc", "broadcast")
# Prompts in flight for each of a batch: others would be old before their turn comes.
MOST_OVERSAMPLING = 1000
# A name, or an address of IPv4.
_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]{0,252})?")
ON_LOST_WORKER = ("continue", "stop")
# Most answers of one request to a worker: so many times the sequences that it decodes at once.
SAMPLES_PER_PLACE = 16
# Longer than this no worker waits for a layer.
MAX_SYNC_TIMEOUT_S = 3600.0
# Logits divided by less leave fp32; divided by more, they say nothing.
TEMPERATURES = (1e-6, 1e6)


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Rollout engines and sampling."""

    engine: str = "embedded"
    """What samples the answers: one of ours (lmdeploy is another name for turbomind), or your own."""

    rollout_python: Path | None = None
    """Interpreter that runs the workers, where the engine wants an environment of its own; default: this one."""

    rollout_num_workers: int | None = None
    """Rollout worker processes that share the prompts; default: one for each GPU, or one on a CPU machine."""

    rollout_worker_urls: str | None = None
    """Workers on other hosts, started there with `xrl worker --host ADDRESS`, as host:port,host:port; none is started
    here then."""

    rollout_worker_key_file: Path | None = None
    """File with the key of those workers, the one of their --key-file; only you may read it. Default:
    ~/.config/xrl/worker.key, where workers look for it too."""

    rollout_num_threads: int | None = None
    """CPU threads of each worker; default: the machine's cores, shared evenly by the workers."""

    rollout_max_batch_size: int = 1024
    """Sequences one engine decodes at once; more wait their turn."""

    rollout_kv_cache_gb: float | None = None
    """Most memory that the keys and values of one embedded engine take, in GB (10^9 bytes); the samples that came last
    wait where more is needed. Default: 90% of what is free on its GPU beside the weights; on CPU half of what is free,
    shared evenly by the workers."""

    rollout_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the engine's weights; auto: the actor's."""

    rollout_timeout_s: float = 1800.0
    """A prompt unanswered for longer than this is retried, then counted as failed."""

    rollout_max_retries: int = 2
    """Tries after the first for a prompt whose request failed."""

    on_lost_worker: Literal["continue", "stop"] = "continue"
    """When a rollout worker dies or hangs: go on with the others, or stop."""

    rollout_max_restarts: int = 3
    """Times a rollout worker that died is started again; it takes part after the next weight update."""

    partial_rollout: bool = False
    """Ask for more prompts than a batch needs and stop when enough are finished; the rest goes on in the next rollout,
    from the tokens it has."""

    partial_rollout_tokens: int | None = None
    """With --partial-rollout: tokens by which each answer grows before it is looked at which groups are whole; a run
    then repeats to the bit; default: a rollout stops as soon as enough are whole, which is when the clock says."""

    oversampling: float = 1.5
    """With --partial-rollout: prompts in flight for each prompt of a batch."""

    colocate: bool = False
    """Actor and engines take turns on the same devices: engines give theirs up while the actor trains, and the actor's
    gradients, main weights and optimizer state are on the host while engines sample."""

    weight_transport: Literal["auto", "shared_memory", "cuda_ipc", "broadcast"] = "auto"
    """How weights reach the workers: shared_memory (one host), cuda_ipc (one host, CUDA), broadcast (any hosts), or
    auto: shared_memory, with --rollout-worker-urls broadcast."""

    weight_sync_timeout_s: float = 120.0
    """A worker that does not take a layer within this time is lost; through shared memory, within twice the time, as it
    is told of a layer while it takes the one before."""

    canary_tokens: int = 16
    """Tokens that each worker samples after every weight update, for the actor to score; 0: no canary."""

    canary_warn: float | None = None
    """Warn when the canary's mean |rollout - actor log-prob| exceeds this; default: 1e-4 in fp32, 0.05 in bf16."""

    canary_stop: float | None = None
    """End the run when it exceeds this; default: 0.01 in fp32, 0.5 in bf16."""

    mismatch_warn: float | None = None
    """Warn when the mean |rollout - actor log-prob| of a rollout's tokens exceeds this; default: as the canary's, none
    with --partial-rollout, --top-k or --top-p, where they differ by design."""

    mismatch_stop: float | None = None
    """End the run when it exceeds this; default: as the canary's, none in the same cases."""

    temperature: float = 1.0
    """Sampling temperature; the actor's log-probs use the same."""

    top_k: int = 0
    """Sample among the k likeliest tokens; 0 keeps all."""

    top_p: float = 1.0
    """Sample among the likeliest tokens that hold this share of the probability."""

    allow_biased_sampling: bool = False
    """Accept top-k or top-p filtering in training, knowing that the actor's ratio is then biased."""

    max_response_length: int = 1024
    """Longest answer in tokens."""

    ignore_eos: bool = False
    """Let every answer run to --max-response-length (for benchmarks)."""

    def __post_init__(self) -> None:
        for name in ("rollout_num_workers", "rollout_max_batch_size", "max_response_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingsError(f"--{name.replace('_', '-')} must be >= 1, got {value}")
        if self.rollout_python is not None and not (
            self.rollout_python.is_file() and os.access(self.rollout_python, os.X_OK)
        ):
            raise SettingsError(
                f"--rollout-python {self.rollout_python} must be a Python interpreter, found none there"
            )
        if self.rollout_kv_cache_gb is not None:
            if not 0 < self.rollout_kv_cache_gb < math.inf:
                raise SettingsError(f"--rollout-kv-cache-gb must be > 0, got {self.rollout_kv_cache_gb:g}")
            if self.engine != "embedded":
                raise SettingsError(
                    f"--rollout-kv-cache-gb bounds the embedded engine, --engine {self.engine} has a cache of its own"
                )
            if self.worker_addresses:
                raise SettingsError(
                    "--rollout-kv-cache-gb is for workers that are started here: give those of --rollout-worker-urls "
                    "theirs with `xrl worker --kv-cache-gb`"
                )
        if self.partial_rollout_tokens is not None and (self.partial_rollout_tokens < 1 or not self.partial_rollout):
            raise SettingsError(
                f"--partial-rollout-tokens {self.partial_rollout_tokens} must be >= 1, and needs --partial-rollout"
            )
        if self.rollout_num_threads is not None and self.rollout_num_threads < 1:
            raise SettingsError(f"--rollout-num-threads must be >= 1, got {self.rollout_num_threads}")
        if self.rollout_dtype not in ("auto", "float32", "bfloat16"):
            raise SettingsError(f"--rollout-dtype must be auto, float32 or bfloat16, got {self.rollout_dtype!r}")
        if self.rollout_timeout_s <= 0 or self.rollout_max_retries < 0:
            raise SettingsError(
                f"--rollout-timeout-s must be > 0 and --rollout-max-retries >= 0, "
                f"got {self.rollout_timeout_s:g} and {self.rollout_max_retries}"
            )
        for name in ("rollout_timeout_s", "weight_sync_timeout_s"):
            check_at_most(f"--{name.replace('_', '-')}", getattr(self, name), LONGEST_S)
        self._check_workers()
        self._check_canary()
        low, high = TEMPERATURES
        if not low <= self.temperature <= high:
            raise SettingsError(
                f"--temperature must be > 0 in training, in [{low:g}, {high:g}], got {self.temperature:g}"
            )
        if not 0 <= self.top_k < 2**63 or not 0 < self.top_p <= 1:
            raise SettingsError(f"--top-k must be >= 0 and --top-p in (0, 1], got {self.top_k} and {self.top_p:g}")
        if (self.top_k > 0 or self.top_p < 1) and not self.allow_biased_sampling:
            raise SettingsError(
                f"--top-k {self.top_k} --top-p {self.top_p:g} sample from a filtered distribution that the actor "
                f"does not score, so every ratio would be biased: use --top-k 0 --top-p 1, "
                f"or say --allow-biased-sampling"
            )

    @property
    def worker_addresses(self) -> list[tuple[str, int]]:
        """(host, port) of each worker of --rollout-worker-urls."""
        return [_address(part) for part in (self.rollout_worker_urls or "").split(",") if part.strip()]

    @property
    def chosen_transport(self) -> str:
        """The row of the table in xrl/weights/transport."""
        if self.weight_transport != "auto":
            return self.weight_transport
        return "broadcast" if self.worker_addresses else "shared_memory"

    def _check_workers(self) -> None:
        for name, known in (("on_lost_worker", ON_LOST_WORKER), ("weight_transport", WEIGHT_TRANSPORTS)):
            if getattr(self, name) not in known:
                raise SettingsError(
                    f"--{name.replace('_', '-')} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        if self.rollout_max_restarts < 0 or not 0 < self.weight_sync_timeout_s <= MAX_SYNC_TIMEOUT_S:
            raise SettingsError(
                f"--rollout-max-restarts must be >= 0 and --weight-sync-timeout-s > 0 and at most "
                f"{MAX_SYNC_TIMEOUT_S:g}, got {self.rollout_max_restarts} and {self.weight_sync_timeout_s:g}"
            )
        if not 1 <= self.oversampling < math.inf:
            raise SettingsError(f"--oversampling must be a number >= 1, got {self.oversampling:g}")
        check_at_most("--oversampling", self.oversampling, MOST_OVERSAMPLING)
        if self.rollout_worker_urls is not None and not self.worker_addresses:
            raise SettingsError(f"--rollout-worker-urls needs host:port,host:port, found {self.rollout_worker_urls!r}")
        if len(set(self.worker_addresses)) < len(self.worker_addresses):
            raise SettingsError(f"--rollout-worker-urls {self.rollout_worker_urls} names a worker twice")
        if self.worker_addresses and self.rollout_num_workers is not None:
            raise SettingsError(
                "--rollout-num-workers starts workers here, --rollout-worker-urls uses others: take one"
            )
        if self.rollout_worker_key_file is not None and not self.worker_addresses:
            raise SettingsError(
                "--rollout-worker-key-file is for workers of --rollout-worker-urls: those that are started here get a "
                "key of their own"
            )
        if self.worker_addresses and self.colocate:
            raise SettingsError(
                "--colocate is for engines on the actor's own devices, --rollout-worker-urls names workers elsewhere"
            )
        if self.worker_addresses and self.weight_transport in ("shared_memory", "cuda_ipc"):
            raise SettingsError(
                f"--weight-transport {self.weight_transport} reaches workers on this host only: use broadcast or auto "
                f"with --rollout-worker-urls"
            )

    def _check_canary(self) -> None:
        if self.canary_tokens < 0:
            raise SettingsError(f"--canary-tokens must be >= 0, got {self.canary_tokens}")
        for name in ("canary_warn", "canary_stop", "mismatch_warn", "mismatch_stop"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise SettingsError(f"--{name.replace('_', '-')} must be > 0, got {value:g}")


def _address(text: str) -> tuple[str, int]:
    host, colon, digits = text.strip().removeprefix("http://").rstrip("/").rpartition(":")
    port = whole_number(digits)
    if not colon or port is None or not 0 < port < 65536 or not _HOST.fullmatch(host):
        hint = " (of IPv6, the host's name)" if host.count(":") > 1 or "[" in host else ""
        raise SettingsError(f"--rollout-worker-urls needs host:port,host:port{hint}, found {shown(text.strip())}")
    return host, port
