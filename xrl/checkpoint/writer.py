"""Saved states are written while the training goes on: each rank copies what it has to write, and a thread writes it.

    begin    room on the disk for all of it; the folder, under another name; every rank takes its copy
    settle   are all ranks' files on the disk? then rank 0 adds its own and the manifest, and gives the folder its name
    finish   the same, waiting for the threads

A save that fails costs that save alone: the folder vanishes, the last good state stays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from xrl.checkpoint.files import file_checksum
from xrl.checkpoint.manifest import (
    LEAD_FILE,
    MANIFEST_FILE,
    STEP_NAME,
    FileRecord,
    Manifest,
    saved_steps,
    step_folder,
)
from xrl.files.atomic_folder import atomic_folder, remove_folder, remove_leftovers
from xrl.files.disk import NotWritten, free_bytes
from xrl.files.whole import flush_to_disk
from xrl.parallel.control import Control

logger = logging.getLogger("xrl")

# Of the manifest, headers and what a disk rounds up, a file.
_EXTRA_BYTES = 2**16


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A state that is on the disk whole."""

    step: int
    folder: Path
    num_bytes: int  # of all ranks
    seconds: float  # of the snapshot, of the slowest rank's writing, and of its name; not those in which nobody looked
    seconds_held_up: float  # of these, the run waited


@dataclass(frozen=True, kw_only=True)
class LeadPart:
    """What rank 0 adds to a state."""

    manifest: Manifest  # without files
    arrays: Mapping[str, Tensor]


@dataclass(kw_only=True, eq=False)
class _UnderWay:
    """A save that has begun."""

    step: int
    num_bytes: int
    thread: threading.Thread
    result: dict[str, Any]  # of this rank's file, once its thread has ended
    snapshot_s: float
    held_up: float
    lead: LeadPart | None
    folder: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)  # on rank 0: gives it its name
    partial: Path


class StateWriter:
    """Writes the states of a run. Every rank has one; its methods are collective."""

    def __init__(self, state_dir: Path, control: Control, *, file_name: str, keep: int, reserve_bytes: int = 0) -> None:
        """
        Args:
            state_dir: of all ranks.
            file_name: of this rank's file.
            keep: how many of the newest states stay.
            reserve_bytes: of the disk, for what comes at the end: no state takes them.
        """
        self.state_dir = state_dir
        self._control, self._file_name, self._keep, self._reserve_bytes = control, file_name, keep, reserve_bytes
        self._under_way: _UnderWay | None = None

    @property
    def is_writing(self) -> bool:
        """Whether a save has begun and has not been settled: the same on every rank."""
        return self._under_way is not None

    def begin(
        self, step: int, pieces: Mapping[str, Tensor], lead: LeadPart | None, *, is_last: bool = False
    ) -> NotWritten | None:
        """Take a copy of a state and begin to write it.

        Args:
            pieces: this rank's, by their names in its file; read before this returns, and not afterwards.
            lead: on rank 0, None on the others.
            is_last: nothing comes behind it, so that no room need be left.

        Returns:
            why it cannot be written, on rank 0; None on the others, and where it can.
        """
        assert self._under_way is None, "the last save is not settled"
        start = time.perf_counter()
        own_bytes = sum(tensor.nbytes for tensor in pieces.values())
        num_bytes = sum(self._control.gather(own_bytes + _EXTRA_BYTES))
        target = step_folder(self.state_dir, step)
        folder, fault, partial = contextlib.ExitStack(), None, None
        if lead is not None:
            num_bytes += sum(tensor.nbytes for tensor in lead.arrays.values())
            try:
                partial = self._opened(folder, target, num_bytes, 0 if is_last else self._reserve_bytes)
            except OSError as error:
                fault = error if isinstance(error, NotWritten) else NotWritten(target, error, num_bytes=num_bytes)
        said = self._control.gather("" if partial is None else str(partial))[0]
        if not said:
            return fault
        # A copy, wherever it is: the next update changes what is written now.
        snapshot = {name: tensor.to("cpu", copy=True) for name, tensor in pieces.items()}
        result: dict[str, Any] = {}
        thread = threading.Thread(
            target=_write, args=(Path(said) / self._file_name, snapshot, result), name="state-writer", daemon=True
        )
        thread.start()
        self._under_way = _UnderWay(
            step=step,
            num_bytes=num_bytes,
            thread=thread,
            result=result,
            snapshot_s=time.perf_counter() - start,
            held_up=time.perf_counter() - start,
            lead=lead,
            folder=folder,
            partial=Path(said),
        )
        return None

    def settle(self, *, wait: bool = False) -> Saved | NotWritten | None:
        """End the save under way, if all ranks have written their files.

        Args:
            wait: for the threads.

        Returns:
            on rank 0, what has become of it; None where it goes on, or there is none, and on the other ranks.
        """
        save = self._under_way
        if save is None:
            return None
        start = time.perf_counter()
        if wait:
            save.thread.join()  # Unbounded: it writes to a disk, and ends with it; the watch looks after this rank.
        results = self._control.gather({} if save.thread.is_alive() else save.result)
        if not all(results):
            save.held_up += time.perf_counter() - start
            return None
        found: Saved | NotWritten | None = None
        if save.lead is not None:
            found = self._named(save, save.lead, results, start)
        self._under_way = None
        self._control.meet()  # where it has its name, no rank is behind
        return found

    def _opened(self, folder: contextlib.ExitStack, target: Path, num_bytes: int, reserve_bytes: int) -> Path:
        free, needed = free_bytes(self.state_dir), num_bytes + reserve_bytes
        if free is not None and free < needed:
            leaving = "with room left for hf-final, " if reserve_bytes else ""
            why = OSError(errno.ENOSPC, f"{leaving}{os.strerror(errno.ENOSPC).lower()}")
            raise NotWritten(target, why, num_bytes=needed)
        self.state_dir.mkdir(parents=True, exist_ok=True)
        return folder.enter_context(atomic_folder(target))

    def _named(
        self, save: _UnderWay, lead: LeadPart, results: list[dict[str, Any]], start: float
    ) -> Saved | NotWritten:
        target = step_folder(self.state_dir, save.step)
        try:
            with save.folder:
                files = dict(_record(result, rank) for rank, result in enumerate(results))
                if lead.arrays:
                    own: dict[str, Any] = {}
                    _write(save.partial / LEAD_FILE, lead.arrays, own)
                    files |= dict([_record(own, 0)])
                manifest = dataclasses.replace(lead.manifest, files=files)
                (save.partial / MANIFEST_FILE).write_text(manifest.to_json(), encoding="utf-8")
        except OSError as error:
            return NotWritten(target, error, num_bytes=save.num_bytes)
        self._prune()
        now = time.perf_counter()
        num_bytes = sum(record.num_bytes for record in files.values())
        return Saved(
            step=save.step,
            folder=target,
            num_bytes=num_bytes,
            seconds=save.snapshot_s + max(result["seconds"] for result in results) + now - start,
            seconds_held_up=save.held_up + now - start,
        )

    def _prune(self) -> None:
        """Remove the oldest states but for the newest: never the one that was just written."""
        remove_leftovers(self.state_dir, STEP_NAME)
        for step in saved_steps(self.state_dir)[self._keep :]:
            oldest = step_folder(self.state_dir, step)
            try:
                remove_folder(oldest)
            except OSError as error:
                logger.warning("%s cannot be removed: %s", oldest, error.strerror or error)


def _record(result: Mapping[str, Any], rank: int) -> tuple[str, FileRecord]:
    """A rank's file, by its name.

    Raises:
        OSError: it could not be written.
    """
    if "error" in result:
        raise OSError(result["errno"], result["error"]) if result["errno"] else OSError(result["error"])
    return result["file"], FileRecord(num_bytes=result["num_bytes"], checksum=result["checksum"], rank=rank)


def _write(path: Path, tensors: Mapping[str, Tensor], result: dict[str, Any]) -> None:
    """Write a file to the disk; what it came to goes into `result`, at once."""
    found: dict[str, Any]
    start = time.perf_counter()
    try:
        save_file(dict(tensors), path)
        flush_to_disk(path)
        found = {"file": path.name, "num_bytes": path.stat().st_size, "checksum": file_checksum(path)}
        found["seconds"] = time.perf_counter() - start
    except (OSError, SafetensorError) as error:
        why = NotWritten(path, error, num_bytes=0)
        found = {"errno": why.errno, "error": why.strerror}
    except BaseException as error:  # no thread ends without a word: the others would wait for it
        found = {"errno": None, "error": f"{type(error).__name__}: {error}"}
    result.update(found)
