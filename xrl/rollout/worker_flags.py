"""What `xrl worker` is told. Imports no torch, so that bad flags are answered at once."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xrl.config import SettingsError
from xrl.config.errors import unreadable_files_refused
from xrl.config.names import NAMES, known_name
from xrl.config.sentence_parser import SentenceParser
from xrl.rollout import ENGINES, check_engine


@unreadable_files_refused()
def parse_worker_flags(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags of a worker, checked as far as they can be without torch.

    Args:
        argv: default: the process's own.

    Raises:
        SettingsError: one sentence: an unknown flag, a missing one, or a value that cannot be.
    """
    parser = SentenceParser(
        prog="xrl worker",
        description="Host one rollout engine behind HTTP, for `xrl train --rollout-worker-urls HOST:PORT`. Weights "
        "come from the trainer. The one line on stdout, JSON with port and pid, is for programs.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--engine", default="embedded", help=NAMES["engine"].words)
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        default=argparse.SUPPRESS,
        help="Hugging Face folder; only config.json is read",
    )
    parser.add_argument("--dtype", default="float32", help="number format of the weights: float32 or bfloat16")
    parser.add_argument("--device", default="cpu", help="torch device: cpu, or cuda:0 say")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=0, help="port to listen on; 0 takes a free one")
    parser.add_argument(
        "--key-file",
        type=Path,
        default=None,
        help="file with the key that trainers must show, the one of their --rollout-worker-key-file; only you may read "
        "it. Left out: ~/.config/xrl/worker.key, which is made where there is none",
    )
    parser.add_argument("--max-batch-size", type=int, default=1024, help="sequences decoded at once")
    parser.add_argument(
        "--max-model-len",
        type=int,
        required=True,
        default=argparse.SUPPRESS,
        help="longest prompt + response in tokens",
    )
    parser.add_argument(
        "--kv-cache-gb",
        type=float,
        help="most memory of the embedded engine's keys and values, in GB (10^9 bytes); left out: 90%% of what is free "
        "on its GPU beside the weights, or half of what is free on the CPU",
    )
    # Workers that share the host's memory, as the trainer starts them.
    parser.add_argument("--num-workers-on-host", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--num-threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--parent-pid", type=int, help=argparse.SUPPRESS)  # of the trainer that it ends with
    flags = parser.parse_args(argv)
    check_engine(flags.engine)
    # An engine of the user's own may read something else.
    if known_name("engine", flags.engine) in ENGINES and not (flags.model / "config.json").is_file():
        raise SettingsError(f"--model {flags.model} has no config.json: give a Hugging Face folder")
    if flags.kv_cache_gb is not None:
        if not 0 < flags.kv_cache_gb < math.inf:
            raise SettingsError(f"--kv-cache-gb must be > 0, got {flags.kv_cache_gb:g}")
        if known_name("engine", flags.engine) != "embedded":
            raise SettingsError(f"--kv-cache-gb bounds the embedded engine, --engine {flags.engine} has its own cache")
    for name in ("max_batch_size", "max_model_len", "num_threads", "num_workers_on_host"):
        if getattr(flags, name) < 1:
            raise SettingsError(f"--{name.replace('_', '-')} must be >= 1, got {getattr(flags, name)}")
    if not 0 <= flags.port < 65536:
        raise SettingsError(f"--port must be in [0, 65535], got {flags.port}")
    return flags


def embedded_options(flags: argparse.Namespace) -> dict[str, Any]:
    """Options of `create_engine` for the embedded engine alone: the size of its cache."""
    if known_name("engine", flags.engine) != "embedded":
        return {}
    num_bytes = None if flags.kv_cache_gb is None else int(flags.kv_cache_gb * 1e9)
    return {"kv_cache_bytes": num_bytes, "num_workers_on_host": flags.num_workers_on_host}
