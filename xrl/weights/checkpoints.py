"""The Hugging Face folders of a run: written, written later where that failed, and pruned. Rank 0 only."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from xrl.config import RunConfig, SettingsError
from xrl.files.atomic_folder import NotRenamed, remove_folder, remove_leftovers
from xrl.files.disk import NotWritten
from xrl.metrics.run_folder import CHECKPOINT_NAME, RunFolder
from xrl.types import WeightBucket
from xrl.weights.hf_files import write_hf_folder
from xrl.weights.other_files import find_other_files

logger = logging.getLogger("xrl")

# During training, from a try that failed to the next one.
RETRY_AFTER_S = 60.0
# At the end of a run: from one look at the disk to the next, and from one line about it to the next.
LOOK_EVERY_S = 5.0
SAY_EVERY_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Where the time comes from: a test has its own."""

    now: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


class Checkpoints:
    """Writes `hf-<step>` and `hf-final` into a run's folder.

    A full disk costs no weights: during training a later rollout tries again, with the weights of that time, and at its
    end the run waits for room.
    """

    def __init__(
        self, folder: RunFolder, config: RunConfig, *, source: Path, dtype: torch.dtype, clock: Clock | None = None
    ) -> None:
        """
        Args:
            source: the model whose tokenizer and other files go into each folder.
            dtype: number format of the weights.
        """
        self.folder = folder
        self._config = config
        self._source = source
        self._dtype = dtype
        self._clock = clock or Clock()
        self.goes_on = False  # an interrupted attempt has written into the same folder
        self._written: list[Path] = []  # hf-<step>, oldest first
        self._failed_at: float | None = None  # time of the last try, if it failed
        self._said: str | None = None  # what the system said of it, once the user knows
        self._unnamed: NotRenamed | None = None  # of a folder that is whole
        self._waiting_since: float | None = None  # at the end of the run
        self._speak_at = 0.0

    def state_dict(self) -> dict[str, Any]:
        """The folders of this run that count among those to keep."""
        return {"written": [path.name for path in self._written]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with those that are still there."""
        paths = [self.folder.path / name for name in state["written"]]
        self._written = [path for path in paths if path.is_dir()]

    def is_due(self, index: int) -> bool:
        """Whether a checkpoint is to be written after this rollout: by the interval, or since one could not be."""
        interval = self._config.save_interval
        if not interval:
            return False
        waits = self._failed_at is not None and self._clock.now() - self._failed_at >= RETRY_AFTER_S
        return waits or index % interval == 0

    def write(self, name: str, buckets: Iterable[WeightBucket]) -> NotWritten | None:
        """Write one; returns why it is not there, if it is not.

        Args:
            name: hf-<step> or hf-final.
            buckets: gone through to their end in any case, since other ranks take part in each.
        """
        target = self.folder.path / name
        measured = _Measured(buckets, self._dtype)
        failure: Exception | None = None
        try:
            if not self._is_there_after_all(target):
                self._make_way(target)
                write_hf_folder(target, measured, source=self._source, dtype=self._dtype)
        except (OSError, SafetensorError, SettingsError) as error:  # the last: of the folder that it copies from
            failure = error
        for _ in measured:
            pass
        if failure is not None:
            self._unnamed = failure if isinstance(failure, NotRenamed) else None
            self._failed_at = self._clock.now()
            return NotWritten(target, failure, num_bytes=measured.num_bytes + self._num_other_bytes(target))
        self._failed_at = self._said = self._waiting_since = None
        if target != self.folder.final_checkpoint:
            self._written.append(target)
        self._prune()
        return None

    def warn_once(self, fault: NotWritten) -> None:
        """During training: say that a checkpoint is missing, unless that is known."""
        if self._said != fault.strerror:
            self._said = fault.strerror
            logger.warning(
                "%s; the run goes on, and saves after the first rollout that ends %g s from now or later",
                *(fault, RETRY_AFTER_S),
            )

    def wait_for_room(self, fault: NotWritten) -> bool:
        """At the end of a run: wait until another try may help; returns False where the time for that is up."""
        now = tried_at = self._clock.now()
        if self._waiting_since is None:
            self._waiting_since = self._speak_at = now
        until = self._waiting_since + 60 * self._config.save_retry_minutes
        while now < until:
            if now >= self._speak_at:
                self._speak_at = now + SAY_EVERY_S
                logger.warning(
                    "%s; the trained weights wait in memory for another %.3g minutes (--save-retry-minutes): free some "
                    "room, or mend what the system says",
                    *(fault, (until - now) / 60),
                )
            self._clock.sleep(min(LOOK_EVERY_S, until - now))
            now = self._clock.now()
            if not fault.lacks_room or now - tried_at >= SAY_EVERY_S:
                return True
        return False

    def words_about_loss(self, fault: NotWritten) -> str:
        """The end of a run whose last weights could not be saved, in a sentence."""
        newest = self.folder.newest_checkpoint
        left = f"the newest checkpoint is {newest}" if newest else "there is no checkpoint"
        minutes = f"{self._config.save_retry_minutes:g} minutes (--save-retry-minutes)"
        return f"{fault}; it was tried again for {minutes}; {left}"

    def _make_way(self, target: Path) -> None:
        """Remove what an earlier attempt wrote behind the state that this one went on from: it is written anew."""
        if self.goes_on and target.is_dir() and not target.is_symlink():
            remove_folder(target)

    def _is_there_after_all(self, target: Path) -> bool:
        """Whether only a folder's last step was missing, and is done now; what failed tries left is removed."""
        unnamed, self._unnamed = self._unnamed, None
        if unnamed is not None:
            if unnamed.target == target:
                try:
                    os.rename(unnamed.partial, target)
                except OSError as error:
                    raise NotRenamed(unnamed.partial, target, error) from error
                return True
            shutil.rmtree(unnamed.partial, ignore_errors=True)
        if self._failed_at is not None:
            remove_leftovers(self.folder.path, CHECKPOINT_NAME)
        return False

    def _prune(self) -> None:
        """Remove the oldest `hf-<step>` folders of this run but for the newest; `hf-final` stays."""
        keep = self._config.save_keep
        if not keep:
            return
        remove_leftovers(self.folder.path, CHECKPOINT_NAME)
        while len(self._written) > keep:
            oldest = self._written.pop(0)
            if oldest.is_symlink() or not oldest.is_dir():  # somebody has put it elsewhere
                continue
            try:
                remove_folder(oldest)
            except OSError as error:
                logger.warning("%s cannot be removed: %s", oldest, error.strerror or error)

    def _num_other_bytes(self, target: Path) -> int:
        with contextlib.suppress(OSError):
            return find_other_files(self._source, target=target).num_bytes()
        return 0


class _Measured:
    """Buckets as they come, and how many bytes of weights they were so far."""

    def __init__(self, buckets: Iterable[WeightBucket], dtype: torch.dtype) -> None:
        self.num_bytes = 0
        self._buckets = iter(buckets)
        self._itemsize = dtype.itemsize

    def __iter__(self) -> Iterator[WeightBucket]:
        return self

    def __next__(self) -> WeightBucket:
        bucket = next(self._buckets)
        self.num_bytes += sum(tensor.numel() for tensor in bucket.tensors.values()) * self._itemsize
        return bucket
