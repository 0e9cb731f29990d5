"""What a judge may take of the machine, and what it sees of the environment."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from xrl.config import RewardConfig
from xrl.launch.children import child_environment

# Threads count too, but a maths library has one for each core in each process.
THREADS_PER_PROCESS = 16
# Threads of a judge's maths library, which reserves memory for each one that it might use.
MAX_MATHS_THREADS = 8

# What Python, its libraries and other programs need to be found and to find their files. Named one by one as a rule:
# the environment also holds tokens and keys, and addresses of proxies hold passwords.
VARIABLES = frozenset(
    (
        *("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TEMP", "TMP"),
        *("LD_LIBRARY_PATH", "LD_PRELOAD", "DYLD_LIBRARY_PATH", "GLIBC_TUNABLES"),
        *("VIRTUAL_ENV", "CONDA_PREFIX", "CONDA_DEFAULT_ENV"),
        *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
        *("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "TORCH_HOME", "NLTK_DATA"),
        *("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE"),
        *("TRANSFORMERS_CACHE", "TRANSFORMERS_OFFLINE", "TOKENIZERS_PARALLELISM"),
        *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_HOME", "CUDA_PATH", "NVIDIA_VISIBLE_DEVICES"),
    )
)
PREFIXES = ("LC_", "PYTHON", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "NUMEXPR_", "XRL_")
# A name that begins like one of those and holds one of these words is a secret all the same.
SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASS", "CREDENTIAL")


@dataclass(frozen=True, kw_only=True)
class JudgeLimits:
    """What one judge's process may take, what it has started included; None: no limit."""

    memory_bytes: int | None = None
    max_processes: int | None = None  # at once, the judge itself included
    max_file_bytes: int | None = None  # of each file it writes

    @classmethod
    def of(cls, config: RewardConfig) -> JudgeLimits:
        """The limits that the settings name."""
        return cls(
            memory_bytes=_gb(config.judge_memory_gb),
            max_processes=config.judge_max_processes,
            max_file_bytes=_gb(config.judge_max_file_gb),
        )

    def apply(self) -> None:
        """Put this process and all it starts under those limits that the system keeps by itself.

        Memory as data, not as addresses: CUDA and allocators reserve far more addresses than they ever use. It holds
        for each process by itself; the sum over all of them is `Watch`'s business, as is their number: the system
        counts processes of a user, not of a judge, and does not count root's at all.
        """
        if sys.platform == "linux":
            _limit(resource.RLIMIT_DATA, self.memory_bytes)
        _limit(resource.RLIMIT_FSIZE, self.max_file_bytes)
        _limit(resource.RLIMIT_CORE, 0)


def judge_environment(more: Iterable[str] = (), environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables that a judge's process gets: those listed here, and `more`.

    Args:
        more: names of the user's choice, of --judge-env.
        environ: default: this process's, without a rank's variables.
    """
    found = child_environment() if environ is None else environ
    asked_for = frozenset(more)
    kept = {name: value for name, value in found.items() if name in asked_for or _is_harmless(name)}
    kept.setdefault("OMP_NUM_THREADS", str(min(MAX_MATHS_THREADS, os.cpu_count() or 1)))
    return kept


def withheld_variable(key: str, more: Iterable[str] = (), environ: Mapping[str, str] = os.environ) -> str:
    """A hint, where a judge looked for `key` and it is a variable that it was not given; else empty."""
    name = key.strip("'\"")
    is_withheld = name in environ and name not in more and not _is_harmless(name)
    return f"; --judge-env {name} would hand that variable to the judge" if is_withheld else ""


def _is_harmless(name: str) -> bool:
    if name in VARIABLES:
        return True
    return name.startswith(PREFIXES) and not any(word in name.upper() for word in SECRET_WORDS)


def _gb(number: float | None) -> int | None:
    return None if number is None else int(number * 1e9)


def _limit(kind: int, most: int | None) -> None:
    if most is None:
        return
    hard = resource.getrlimit(kind)[1]
    lowest = most if hard == resource.RLIM_INFINITY else min(most, hard)
    with contextlib.suppress(ValueError, OSError):  # a system that has no such limit
        resource.setrlimit(kind, (lowest, lowest))
