"""Saved states without a model: files of a few bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from xrl.checkpoint.manifest import MANIFEST_FILE, Cut, FileRecord, Manifest
from xrl.parallel.layout import Layout


def manifest(step: int = 3, **changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "step": step,
        "num_updates": 2 * step,
        "cut": Cut(layout=Layout(tensor_size=2, pipeline_size=1), use_distributed_optimizer=False, te_layers=False),
        "files": {},
        "identity": {"seed": 1, "data": "abc"},
        "circumstances": {"layout": "TP2 x PP1 x DP1"},
        "settings": {"lr": 1e-6},
        "schedule": {"num_steps": 2 * step},
        "parts": {"experience": {"groups": []}},
    }
    return Manifest(**{**fields, **changes})


def write(state_dir: Path, step: int, **changes: Any) -> Path:
    """A state of two files, of 5 bytes each."""
    folder = state_dir / f"step-{step}"
    folder.mkdir(parents=True)
    files = {}
    for rank, name in enumerate(("t0-p0-d0.safetensors", "t1-p0-d0.safetensors")):
        (folder / name).write_bytes(b"12345")
        files[name] = FileRecord(num_bytes=5, checksum="0", rank=rank)
    text = manifest(step, **{"files": files, **changes}).to_json()
    (folder / MANIFEST_FILE).write_text(text)
    return folder
