"""Where a run writes: one folder a run, named by its start time, and the names inside it."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import re
import tempfile
from dataclasses import dataclass
from datetime import datetime
from itertools import count
from pathlib import Path

from xrl.config import SettingsError
from xrl.config.numbers import numbered
from xrl.files.atomic_folder import remove_leftovers
from xrl.files.disk import NotWritten

logger = logging.getLogger("xrl")

# Names that only a run gives.
CHECKPOINT_NAME = re.compile(r"hf-([0-9]+|final)")
_LOCK_FILE = ".xrl-runs-here"
_RUN_NAME = re.compile(r"[0-9]{14}(-[0-9]+)?")


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run. `create` makes the folder on rank 0; other ranks are told its path."""

    path: Path

    @classmethod
    def create(cls, work_dir: Path) -> RunFolder:
        """Make `work_dir/<YYYYmmddHHMMSS>/`, with `-2`, `-3`, ... where runs start in the same second.

        Raises:
            SettingsError: nothing can be written below work_dir.
        """
        check_writable(work_dir)
        stamp = datetime.now().strftime("%Y%m%d%H%M%S")
        for attempt in count(1):
            path = work_dir / (stamp if attempt == 1 else f"{stamp}-{attempt}")
            try:
                path.mkdir()  # the file system decides who is first
                (path / "logs").mkdir()
            except FileExistsError:
                continue
            except OSError as error:
                with contextlib.suppress(OSError):
                    path.rmdir()
                raise SettingsError(str(NotWritten(path, error, num_bytes=0))) from error
            break
        return cls(path)

    @classmethod
    def open(cls, path: Path, stack: contextlib.ExitStack) -> RunFolder:
        """The folder of a run that has one of its own, made where it is not there yet.

        Args:
            stack: until it ends, no other run may write there.

        Raises:
            SettingsError: nothing can be written there, another run lives in it, or it is somebody else's folder.
        """
        check_run_dir(path)
        check_writable(path, flag="--run-dir")
        folder = cls(path)
        folder.hold(stack)
        try:
            folder.logs.mkdir(exist_ok=True)
        except OSError as error:
            raise SettingsError(str(NotWritten(path, error, num_bytes=0))) from error
        return folder

    def hold(self, stack: contextlib.ExitStack) -> None:
        """Keep other runs out of the folder until the stack ends; it is known as a run's from now on.

        Raises:
            SettingsError: another run lives in it, or nothing can be written there.
        """
        try:
            lock = stack.enter_context((self.path / _LOCK_FILE).open("a"))
        except OSError as error:
            raise SettingsError(str(NotWritten(self.path, error, num_bytes=0))) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SettingsError(
                f"--run-dir {self.path}: another run is live in it, and two would write over each other: end that one "
                f"first"
            ) from error
        except OSError as error:
            logger.warning(
                "%s: its file system has no locks (%s), so no second run in it would be noticed",
                *(self.path, error.strerror),
            )

    @property
    def state(self) -> Path:
        """Folder of saved states."""
        return self.path / "state"

    @property
    def config(self) -> Path:
        """The resolved settings; `--config` takes them again."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """Versions, devices and the command line."""
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        """One JSON object per line, one line per step."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard events."""
        return self.path / "tensorboard"

    @property
    def logs(self) -> Path:
        """Folder of the processes' logs."""
        return self.path / "logs"

    @property
    def ranks(self) -> Path:
        """Where the ranks are found: for `xrl doctor`."""
        return self.logs / "ranks.json"

    @property
    def hang(self) -> Path:
        """What the ranks were at, of a run that ended because it hung."""
        return self.logs / "hang.json"

    @property
    def doctor(self) -> Path:
        """Notes between `xrl doctor` and a run of one rank."""
        return self.logs / "doctor"

    @property
    def reward_curve(self) -> Path:
        """Plot of the reward over the run."""
        return self.path / "reward_curve.png"

    @property
    def status(self) -> Path:
        """How the run is, for scripts: one JSON object (xrl/metrics/status.py)."""
        return self.path / "status.json"

    @property
    def stop_request(self) -> Path:
        """Whoever makes this file asks the run to stop."""
        return self.path / "stop"

    def trajectory(self, rollout_id: int) -> Path:
        """Every answer of one rollout, one JSON object per line."""
        return self.path / f"rollout_idx_{rollout_id}_trajectory.jsonl"

    def samples(self, step: int) -> Path:
        """What a step learned from, with --record-samples."""
        return self.path / "samples" / f"step-{step}.safetensors"

    def checkpoint(self, step: int) -> Path:
        """Hugging Face folder written during the run."""
        return self.path / f"hf-{step}"

    @property
    def final_checkpoint(self) -> Path:
        """Hugging Face folder written at the end."""
        return self.path / "hf-final"

    @property
    def newest_checkpoint(self) -> Path | None:
        """The newest whole Hugging Face folder; None where there is none yet."""
        if self.final_checkpoint.is_dir():
            return self.final_checkpoint
        # Other names are those of folders that are still being written, or were when the run ended.
        folders = [path for path in self.path.glob("hf-*") if path.is_dir()]
        steps = [step for path in folders if (step := numbered(path.name, "hf-")) is not None]
        return self.checkpoint(max(steps)) if steps else None


def check_run_dir(path: Path) -> None:
    """Refuse a folder that is not a run's.

    Raises:
        SettingsError: it is a file, or has something in it, and none of that is a run's.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise SettingsError(f"--run-dir {path} must be a folder, found a file")
    names = {entry.name for entry in path.iterdir()}
    if names and _LOCK_FILE not in names and not {"config.yaml", "environment.json"} <= names:
        raise SettingsError(
            f"--run-dir {path} must be a run's folder, or empty, or not there yet: found {sorted(names)[0]} in it, and "
            f"no run has written there"
        )


def check_writable(folder: Path, *, flag: str = "--work-dir") -> None:
    """Make a folder where it is missing, and try to write into it: permissions alone do not tell on every file system.

    Raises:
        SettingsError: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SettingsError(
            f"{flag} {folder} must be a folder that can be written to: {error.strerror or error}"
        ) from error


def remove_leftovers_of_runs(work_dir: Path) -> None:
    """Remove what killed runs left of checkpoints below work_dir: parts of folders, which no run looks at again."""
    with contextlib.suppress(OSError):
        for path in work_dir.iterdir():
            if _RUN_NAME.fullmatch(path.name) and RunFolder(path).config.is_file():
                remove_leftovers(path, CHECKPOINT_NAME)
