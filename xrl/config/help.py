"""What `xrl train --help` says: the flags most runs set; `--help-all` says them all."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import shutil
import textwrap
import typing
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from xrl.config.flags import FLAGS, Flag
from xrl.config.settings import Settings

# Flags that most runs set, by what they are about.
COMMON: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "Model and data": ("model", "data", "judge", "max_prompt_length", "max_response_length"),
        "Batches and updates": (
            "num_rollouts",
            "num_epochs",
            "rollout_batch_size",
            "samples_per_prompt",
            "updates_per_rollout",
            "max_tokens_per_microbatch",
            "lr",
            "kl_coef",
        ),
        "Layout": ("tensor_model_parallel_size", "pipeline_model_parallel_size"),
        "Rollout engines": ("engine", "rollout_python", "rollout_num_workers", "colocate", "temperature"),
        "Evaluation and output": (
            "eval_data",
            "eval_interval",
            "work_dir",
            "run_dir",
            "save_interval",
            "state_interval",
            "seed",
        ),
    }
)
MAX_COLUMNS = 100


def help_text(prog: str, *, everything: bool) -> str:
    """The help of `prog`, no wider than the terminal or MAX_COLUMNS."""
    columns = min(MAX_COLUMNS, shutil.get_terminal_size((MAX_COLUMNS, 24)).columns)
    sentences = {name: sentence for section in _sections() for name, sentence in field_sentences(section).items()}
    groups: Mapping[str, tuple[str, ...]] = COMMON
    if everything:
        groups = {
            f"{name.capitalize()}: {inspect.cleandoc(section.__doc__ or '')}": tuple(
                field.name for field in dataclasses.fields(section)
            )
            for name, section in typing.get_type_hints(Settings).items()
        }
    num_shown = sum(len(names) for names in groups.values())
    lines = [
        f"usage: {prog} [--nproc-per-node N] [--config FILE.yaml ...] [FLAGS]",
        "",
        *_wrapped("Train a model with GRPO. --model and --data are needed; everything else has a default.", columns),
        "",
        *_entry("--nproc-per-node N", "Ranks that start on this machine. (default: 1)", columns),
        *_entry("--config FILE.yaml", "Take settings from a file. A flag always wins over a file.", columns),
    ]
    if not everything:
        lines += _entry("--help-all", f"Show all {len(FLAGS)} settings; here are {num_shown}.", columns)
    for title, names in groups.items():
        lines += ["", *_wrapped(title, columns)]
        for name in names:
            lines += _entry(
                _spelling(FLAGS[name]), f"{sentences[name]}{_default(FLAGS[name], sentences[name])}", columns
            )
    return "\n".join(lines)


def field_sentences(section: type) -> dict[str, str]:
    """The docstring below each field of a section, on one line."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(definition, ast.ClassDef)
    sentences: dict[str, str] = {}
    for field, below in zip(definition.body, definition.body[1:], strict=False):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            sentences[field.target.id] = " ".join(str(below.value.value).split())
    return sentences


def _sections() -> Iterator[type]:
    yield from typing.get_type_hints(Settings).values()


def _spelling(flag: Flag) -> str:
    if flag.is_switch:
        return f"{flag.option}, --no-{flag.option.removeprefix('--')}"
    return f"{flag.option} {flag.values}"


def _default(flag: Flag, sentence: str) -> str:
    if flag.is_required:
        return " (needed)"
    if flag.default is None or "default:" in sentence:
        return ""
    if flag.is_switch:
        return f" (default: {'on' if flag.default else 'off'})"
    return f" (default: {flag.default:g})" if flag.type is float else f" (default: {flag.default})"


def _entry(spelling: str, sentence: str, columns: int) -> list[str]:
    return [f"  {spelling}", *_wrapped(sentence, columns, indent=" " * 6)]


def _wrapped(text: str, columns: int, *, indent: str = "") -> list[str]:
    # A flag that is named in a sentence stays on one line.
    return textwrap.wrap(text, columns, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
