"""Checksums of whole files, taken by all ranks together, each of its share of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from xrl.parallel.control import Control
from xrl.weights.checksum import tensor_checksum

MISSING = "missing"


def file_checksum(path: Path) -> str:
    """Of a file's bytes: 16 hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    num_bytes = path.stat().st_size
    with path.open("rb"):  # says why it cannot be, in the system's words
        pass
    if not num_bytes:
        return f"{0:016x}"
    return f"{int(tensor_checksum(torch.from_file(str(path), size=num_bytes, dtype=torch.uint8))[0]):016x}"


def checksums(paths: Sequence[Path], control: Control) -> list[str]:
    """The checksum of each file, on every rank; "missing: why" for one that cannot be read. Collective."""
    mine = {index: _checksum(paths[index]) for index in range(control.rank, len(paths), control.num_ranks)}
    found: dict[str, str] = {}
    for part in control.gather({str(index): checksum for index, checksum in mine.items()}):
        found |= part
    return [found[str(index)] for index in range(len(paths))]


def _checksum(path: Path) -> str:
    try:
        return file_checksum(path)
    except OSError as error:
        return f"{MISSING}: {error.strerror or error}"
