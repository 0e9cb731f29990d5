"""Which saved state a run goes on from. No torch: a wrong choice is refused before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from xrl.checkpoint.manifest import MANIFEST_FILE, Manifest, Unusable, check_files, saved_steps, step_folder
from xrl.config import RunConfig, SettingsError

STATE_DIR = "state"


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """A state whose files are all there, at their sizes."""

    folder: Path
    manifest: Manifest

    @staticmethod
    def at(folder: Path) -> SavedState:
        """The one in a folder.

        Raises:
            Unusable: it is not whole.
        """
        manifest = Manifest.read(folder)
        check_files(folder, manifest)
        return SavedState(folder=folder, manifest=manifest)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Where a run begins."""

    state: SavedState | None  # None: at the beginning
    damaged: tuple[tuple[Path, str], ...] = ()  # newer ones that cannot be used, and why


def state_to_resume(run: RunConfig, *, without: Mapping[Path, str] = MappingProxyType({})) -> Choice:
    """What the settings ask for.

    Args:
        without: folders of states that are known to be damaged, and why.

    Raises:
        SettingsError: --resume never, and there is a state; or --resume PATH, and there is no whole one.
        Unusable: there are states, and none is whole: to begin anew would write over what they were made of.
    """
    if run.resume not in ("auto", "never"):
        return Choice(state=_named(Path(run.resume)))
    if run.run_dir is None:
        return Choice(state=None)
    state_dir = run.run_dir / STATE_DIR
    steps = saved_steps(state_dir)
    if run.resume == "never" and steps:
        raise SettingsError(
            f"--resume never, but --run-dir {run.run_dir} has a saved state ({step_folder(state_dir, steps[0]).name}): "
            f"use another --run-dir, or --resume auto to go on from it"
        )
    damaged: list[tuple[Path, str]] = []
    for step in steps:
        folder = step_folder(state_dir, step)
        if folder in without:
            damaged.append((folder, without[folder]))
            continue
        try:
            return Choice(state=SavedState.at(folder), damaged=tuple(damaged))
        except Unusable as error:
            damaged.append((folder, str(error)))
    if steps:
        raise Unusable(
            f"{damaged[0][1]}, and --run-dir {run.run_dir} has no other whole state: use another --run-dir, or "
            f"--resume PATH"
        )
    return Choice(state=None)


def put_aside(folder: Path, ending: str) -> Path:
    """Give a state another name, so that it is no longer found, and not in the way of a new one.

    Args:
        ending: "damaged" or "superseded".

    Returns:
        its new name.

    Raises:
        OSError: it cannot be renamed.
    """
    for number in range(1, 1000):
        other = folder.with_name(f"{folder.name}.{ending}" + (f"-{number}" if number > 1 else ""))
        if not os.path.lexists(other):
            os.rename(folder, other)
            return other
    raise FileExistsError(f"{folder}: too many of its name are aside")


def _named(path: Path) -> SavedState:
    """The state that somebody has named: never another one."""
    if (path / MANIFEST_FILE).is_file():
        return SavedState.at(path)
    steps = saved_steps(path / STATE_DIR)
    if not steps:
        raise SettingsError(
            f"--resume {path} needs a saved state ({MANIFEST_FILE} in it), or a run's folder with one below "
            f"{STATE_DIR}/; found neither"
        )
    return SavedState.at(step_folder(path / STATE_DIR, steps[0]))
