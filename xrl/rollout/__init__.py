"""Sampling: engines behind one contract, the worker processes that host them, and the fleet that feeds those.

    engine.py     the contract of engines
    embedded/     an engine: a fast batched decoder for CPU and CUDA
    turbomind.py  an engine: LMDeploy's TurboMind, for CUDA
    worker.py     the process that hosts an engine; protocol.py: what is said to it over HTTP
    gate.py       who may say it; calls.py: what is done then
    process.py    one worker process, started and ended; roster.py: many, and who of them is ready
    client.py     how they are called; dispatch.py: the requests of a rollout, spread over them
    fleet.py      all of that behind one face, which the rest of the house uses
    publish.py    weights to the workers; publisher.py: checked, and repeated where all were lost

An engine is one row of the table below: its factory, imported only when it is chosen, so that listing the
names costs nothing. Its name, and other names for it, are in xrl/config/names.py too, for `--help`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from xrl.config import SettingsError
from xrl.config.names import hint, known_name

if TYPE_CHECKING:
    from xrl.rollout.engine import Engine

ENGINES: Mapping[str, str] = MappingProxyType(
    {
        "embedded": "xrl.rollout.embedded.engine:EmbeddedEngine",
        "turbomind": "xrl.rollout.turbomind:TurboMindEngine",
    }
)


def check_engine(name: str) -> None:
    """Refuse an engine that nobody knows, without importing one.

    Raises:
        SettingsError: neither a row of the table nor a `package.module:factory` whose module can be found.
    """
    if known_name("engine", name) in ENGINES:
        return
    module, _, factory = name.partition(":")
    if not module or not factory:
        raise SettingsError(
            f"--engine {name!r} is unknown{hint('engine', name)}: take one of {', '.join(sorted(ENGINES))}, or an "
            f"engine of your own as package.module:factory"
        )
    try:
        found = find_spec(module)
    except (ImportError, ValueError):  # of a package above it
        found = None
    if found is None:
        raise SettingsError(
            f"--engine {name!r}: there is no module {module} to import: install it, or put its folder on PYTHONPATH"
        )


def create_engine(
    name: str,
    *,
    model_dir: Path,
    dtype: str,
    device: str,
    max_batch_size: int,
    num_threads: int,
    max_model_len: int,
    **options: Any,
) -> Engine:
    """Build the engine called `name`, without weights.

    Args:
        model_dir: Hugging Face folder; only its config.json is needed.
        dtype: "float32", "bfloat16" or another that the engine computes in, of weights and KV cache.
        device: a torch device, such as "cpu" or "cuda:0".
        max_batch_size: sequences decoded at once; more wait their turn.
        num_threads: CPU threads of the engine.
        max_model_len: longest prompt + response in tokens.
        options: what this engine alone takes; of the embedded one, kv_cache_bytes and num_workers_on_host.

    Raises:
        SettingsError: unknown name, or a model the engine cannot run.
    """
    check_engine(name)
    name = known_name("engine", name)
    module, _, factory = ENGINES.get(name, name).partition(":")
    return getattr(import_module(module), factory)(
        model_dir=model_dir,
        dtype=dtype,
        device=device,
        max_batch_size=max_batch_size,
        num_threads=num_threads,
        max_model_len=max_model_len,
        **options,
    )
