"""`xrl convert`: from its flags to `xrl.weights.convert`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from xrl.config import SettingsError
from xrl.config.errors import unreadable_files_refused
from xrl.files.disk import NotWritten, check_space, nearest_folder
from xrl.launch.terminal import one_line
from xrl.parallel.layout import Layout
from xrl.weights.convert import (
    HuggingFaceSource,
    differences,
    megatron_bytes,
    open_source,
    round_trip,
    to_huggingface,
    to_megatron,
    total_bytes,
)
from xrl.weights.megatron_files import MegatronReader
from xrl.weights.other_files import find_other_files
from xrl.weights.plan import Plan, plan

# Flag -> field of Layout.
_LAYOUT_FLAGS = {
    "tensor_model_parallel_size": "tensor_size",
    "pipeline_model_parallel_size": "pipeline_size",
    "virtual_pipeline_model_parallel_size": "virtual_pipeline_size",
    "expert_model_parallel_size": "expert_size",
    "decoder_first_pipeline_num_layers": "first_stage_layers",
    "decoder_last_pipeline_num_layers": "last_stage_layers",
}
_EXIT_DIFFERENT = 1


@unreadable_files_refused()
def run(arguments: argparse.Namespace) -> int:
    """Do what the flags say; the exit code.

    Raises:
        SettingsError: one sentence, before anything is written.
    """
    source = open_source(arguments.source)
    if arguments.check:
        return _check(source, arguments)
    target: Path | None = arguments.target
    if target is None:
        raise SettingsError("--to is missing: give the folder to write")
    planned = _plan(source, arguments)
    is_export = isinstance(source, MegatronReader) and not _has_layout(arguments)
    num_bytes = total_bytes(source) if is_export else megatron_bytes(planned, source)
    num_bytes += find_other_files(source.other_files, target=target).num_bytes()
    _check_target(target, num_bytes)
    try:
        _write(source, target, planned, is_export=is_export)
    except (OSError, RuntimeError) as error:  # a full disk is both, by whom it is noticed
        raise SettingsError(f"--to {NotWritten(target, error, num_bytes=num_bytes)}") from error
    print(one_line(f"{target}: {len(source.tensors):,} tensors, {total_bytes(source):,} bytes"))
    return 0


def _write(source: HuggingFaceSource | MegatronReader, target: Path, planned: Plan, *, is_export: bool) -> None:
    if is_export:
        assert isinstance(source, MegatronReader)
        with _bar(f"{source.planned.layout} -> Hugging Face", total_bytes(source)) as bar:
            to_huggingface(source, target, bar.update)
    else:
        with _bar(f"-> Megatron, {planned.layout}", total_bytes(source)) as bar:
            to_megatron(source, target, planned, bar.update)


def _check(source: HuggingFaceSource | MegatronReader, arguments: argparse.Namespace) -> int:
    """Report every tensor that differs."""
    if arguments.target is not None:
        if _has_layout(arguments):
            raise SettingsError("--check compares two folders as they are: leave out --to or the layout flags")
        other = open_source(arguments.target)
        with _bar("comparing", total_bytes(source)) as bar:
            found = _report(differences(source, other, bar.update))
        sources = [source, other]
    else:
        planned = _plan(source, arguments)
        with _bar(f"there and back, {planned.layout}", total_bytes(source)) as bar:
            found = _report(round_trip(source, planned, bar.update))
        sources = [source]
    for megatron in sources:
        if isinstance(megatron, MegatronReader):
            found += _report(megatron.differing_copies())
    print(f"{len(source.tensors):,} tensors, " + (f"{found:,} differ" if found else "all equal, bit by bit"))
    return _EXIT_DIFFERENT if found else 0


def _report(findings: Iterable[str]) -> int:
    count = 0
    for finding in findings:
        tqdm.write(one_line(f"differs: {finding}"), file=sys.stdout)
        count += 1
    return count


def _has_layout(arguments: argparse.Namespace) -> bool:
    return any(getattr(arguments, flag) is not None for flag in (*_LAYOUT_FLAGS, "transformer_impl"))


def _plan(source: HuggingFaceSource | MegatronReader, arguments: argparse.Namespace) -> Plan:
    given = {field: value for flag, field in _LAYOUT_FLAGS.items() if (value := getattr(arguments, flag)) is not None}
    try:
        data_size = max(1, given.get("expert_size", 1))  # a replica for each share of the experts
        layout = Layout(**{"tensor_size": 1, "pipeline_size": 1, "data_size": data_size, **given})
    except ValueError as error:
        raise SettingsError(f"the layout is impossible: {error}") from error
    return plan(source.shape, layout, transformer_engine=arguments.transformer_impl == "transformer_engine")


def _check_target(target: Path, num_bytes: int) -> None:
    """Refuse to start what cannot be written."""
    if os.path.lexists(target):
        raise SettingsError(f"--to {target} exists already: nothing is replaced, give a folder that does not exist")
    existing = nearest_folder(target)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise SettingsError(f"--to {target} cannot be made: {existing} is no folder that can be written to")
    check_space(target, num_bytes, what=f"--to {target}")


def _bar(title: str, num_bytes: int) -> tqdm[NoReturn]:
    # None: only on a terminal; in a log every step of the bar would be glued to the one before.
    return tqdm(total=num_bytes, desc=title, unit="B", unit_scale=True, disable=None)
