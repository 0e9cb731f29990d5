"""What differs between the run that saved a state and the one that goes on from it. No torch.

identity        data, order, tokenizer, model: another one is another run, and is refused
settings        any may change; those that its numbers depend on are named, since the run no longer repeats
circumstances   layout, threads, processor, versions: the same
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from xrl.checkpoint.manifest import Unusable
from xrl.config import Settings
from xrl.models.shape import ModelShape

# Settings that no number of a run depends on, and paths: of data and model it is the content that counts.
_WITHOUT_EFFECT = frozenset(
    {
        *("model", "data", "eval_data"),
        *("work_dir", "run_dir", "resume", "state_interval", "state_keep", "exit_before"),
        *("save_interval", "save_keep", "save_retry_minutes", "log_interval", "tensorboard", "record_samples"),
        *("rollout_num_workers", "rollout_worker_urls", "rollout_num_threads", "rollout_kv_cache_gb"),
        *("rollout_timeout_s", "rollout_max_retries", "rollout_max_restarts", "rollout_max_batch_size"),
        *("rollout_worker_key_file", "rollout_python", "on_lost_worker"),
        *("weight_sync_timeout_s", "weight_transport", "distributed_timeout_minutes"),
        *("judge_num_workers", "judge_memory_gb", "judge_max_processes", "judge_max_file_gb", "on_nothing_learned"),
        *("hang_limit_scale", "canary_tokens", "canary_warn", "canary_stop", "mismatch_warn", "mismatch_stop"),
        *("eval_interval", "eval_samples_per_prompt", "eval_temperature", "eval_max_prompts"),
    }
)
# What prompts are made by, and where answers end.
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json"),
)
_CHUNK_BYTES = 2**20


def identity(settings: Settings, shape: ModelShape) -> dict[str, Any]:
    """What must be the same in a run that goes on.

    Raises:
        OSError: a file cannot be read.
    """
    return {
        "data": _file_hash(settings.data.data),
        "tokenizer": {
            name: _file_hash(settings.model.model / name)
            for name in _TOKENIZER_FILES
            if (settings.model.model / name).is_file()
        },
        "model": _plain(dataclasses.asdict(shape)),
        "seed": settings.run.seed,
        "shuffle": settings.data.shuffle,
        "max_prompt_length": settings.data.max_prompt_length,
    }


def flat_settings(settings: Settings) -> dict[str, Any]:
    """Every setting by its flag's name, in values that JSON has."""
    return {
        name: _plain(value)
        for section in dataclasses.fields(settings)
        for name, value in dataclasses.asdict(getattr(settings, section.name)).items()
    }


def refuse_another_run(saved: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Refuse to go on with what would be another run.

    Args:
        saved: its identity; keys that only one of the two has say nothing.
        folder: of the state.

    Raises:
        Unusable: naming what differs.
    """
    for name, value in now.items():
        if name not in saved or saved[name] == value:
            continue
        if name in ("data", "tokenizer", "reference"):
            what = {"data": "--data has", "tokenizer": "the tokenizer of --model has", "reference": "--model has"}
            differs = f"{what[name]} other content than the run that saved it had"
            if isinstance(value, Mapping):
                keys = {*value, *saved[name]}
                differs += f" ({', '.join(sorted(key for key in keys if value.get(key) != saved[name].get(key)))})"
        elif name == "model":
            inner = next(key for key in value if value[key] != saved[name].get(key))
            differs = f"its model has {inner} {saved[name].get(inner)}, --model has {value[inner]}"
        else:
            differs = f"it was saved with {_flag(name)} {saved[name]}, now it is {value}"
        raise Unusable(f"{folder} cannot be gone on from: {differs}; use what it was saved with, or another --run-dir")


def differences(
    saved_settings: Mapping[str, Any],
    settings: Mapping[str, Any],
    saved_circumstances: Mapping[str, Any],
    circumstances: Mapping[str, Any],
) -> Iterator[tuple[str, bool]]:
    """What has changed since the state was saved, a phrase each, and whether the run's bits depend on it."""
    for name in sorted({*saved_settings, *settings}):
        before, now = saved_settings.get(name), settings.get(name)
        if before != now and name not in ("run_dir", "resume", "work_dir"):
            yield f"{_flag(name)} is {now}, was {before}", _has_effect(name, settings)
    for name in sorted({*saved_circumstances, *circumstances}):
        before, now = saved_circumstances.get(name), circumstances.get(name)
        if before != now:
            yield f"{name.replace('_', ' ')}: {now}, was {before}", True


def _has_effect(name: str, settings: Mapping[str, Any]) -> bool:
    if name in ("num_rollouts", "num_epochs"):  # neither a constant rate nor one with a length of its own knows
        return settings.get("lr_decay_style") != "constant" and settings.get("lr_decay_iters") is None
    return name not in _WITHOUT_EFFECT


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _file_hash(path: Path) -> str:
    found = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            found.update(chunk)
    return found.hexdigest()


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    return value
