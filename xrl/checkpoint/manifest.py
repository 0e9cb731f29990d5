"""What a saved state is made of, in words and numbers. No torch."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from xrl.config import SettingsError
from xrl.config.numbers import numbered
from xrl.parallel.layout import Layout, Place

FORMAT = 1
MANIFEST_FILE = "manifest.json"
LEAD_FILE = "lead.safetensors"
STEP_NAME = re.compile(r"step-[0-9]+")


class Unusable(SettingsError):
    """A saved state that cannot be gone on from: which file of it, and why, in a sentence."""


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One of its files, as it was written."""

    num_bytes: int
    checksum: str  # of all its bytes (weights/checksum.py)
    rank: int  # that wrote it


@dataclass(frozen=True, kw_only=True)
class Cut:
    """How the ranks that saved had cut the model."""

    layout: Layout
    use_distributed_optimizer: bool
    te_layers: bool  # transformer-engine's, which are cut otherwise in places


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything but the tensors."""

    step: int  # rollouts that were learned from
    num_updates: int  # of the optimizer: 0, and no moments were saved
    cut: Cut
    files: Mapping[str, FileRecord]
    identity: Mapping[str, Any]  # what must be the same in a run that goes on (changes.py)
    circumstances: Mapping[str, Any]  # what its bits depend on besides
    settings: Mapping[str, Any]  # by flag
    schedule: Mapping[str, Any]  # megatron-core's, of the learning rate
    parts: Mapping[str, Mapping[str, Any]]  # state_dict of everything else that has one; arrays are in LEAD_FILE

    def to_json(self) -> str:
        """As a file, with a checksum of itself."""
        said = {"format": FORMAT, **asdict(self)}
        return json.dumps({**said, "checksum": _checksum(said)}, indent=1)

    @staticmethod
    def read(folder: Path) -> Manifest:
        """The manifest of a state.

        Raises:
            Unusable: there is none, or it is of another format or damaged.
        """
        file = folder / MANIFEST_FILE
        try:
            said = json.loads(file.read_bytes())
        except OSError as error:
            raise Unusable(f"{file} cannot be read: {error.strerror or error}") from error
        except ValueError as error:
            raise Unusable(f"{file} is no JSON: {error}") from error
        found = said.get("format") if isinstance(said, dict) else None
        if found != FORMAT:
            raise Unusable(f"{file} has format {found!r}, this version of xrl reads {FORMAT}")
        checksum = said.pop("checksum", None)
        if checksum != _checksum(said):
            raise Unusable(f"{file} is damaged: it has checksum {_checksum(said)}, it was written with {checksum}")
        try:
            return _manifest(said)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Unusable(f"{file} is damaged: {type(error).__name__}: {error}") from error


def _checksum(said: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=16).hexdigest()


def _manifest(said: Mapping[str, Any]) -> Manifest:
    cut = said["cut"]
    files = {str(name): FileRecord(**record) for name, record in said["files"].items()}
    for name, record in files.items():
        if Path(name).name != name or not isinstance(record.num_bytes, int) or not isinstance(record.checksum, str):
            raise ValueError(f"file {name!r}")
    return Manifest(
        step=int(said["step"]),
        num_updates=int(said["num_updates"]),
        cut=Cut(
            layout=Layout(**cut["layout"]),
            use_distributed_optimizer=bool(cut["use_distributed_optimizer"]),
            te_layers=bool(cut["te_layers"]),
        ),
        files=files,
        identity=dict(said["identity"]),
        circumstances=dict(said["circumstances"]),
        settings=dict(said["settings"]),
        schedule=dict(said["schedule"]),
        parts={str(name): dict(part) for name, part in said["parts"].items()},
    )


def rank_file(place: Place) -> str:
    """The file of the rank at a place."""
    context = f"-c{place.context}" if place.context else ""
    return f"t{place.tensor}-p{place.pipeline}-d{place.data}{context}.safetensors"


def step_folder(state_dir: Path, step: int) -> Path:
    """Where the state after a step is, or will be."""
    return state_dir / f"step-{step}"


def saved_steps(state_dir: Path) -> list[int]:
    """Steps whose folders have their final name, the newest first; whether they are whole is another question."""
    try:
        names = [entry.name for entry in os.scandir(state_dir) if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    return sorted((step for name in names if (step := numbered(name, "step-")) is not None), reverse=True)


def check_files(folder: Path, manifest: Manifest) -> None:
    """Look whether every file is there, at its size.

    Raises:
        Unusable: naming the first that is not, and the rank that wrote it.
    """
    for name, record in manifest.files.items():
        file = folder / name
        try:
            found = file.stat().st_size
        except OSError as error:
            raise Unusable(f"{file}, written by rank {record.rank}, is missing: {error.strerror or error}") from error
        if found != record.num_bytes:
            raise Unusable(
                f"{file}, written by rank {record.rank}, has {found:,} bytes, it was written with {record.num_bytes:,}"
            )
