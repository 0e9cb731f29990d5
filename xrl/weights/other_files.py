"""What lies beside a model's weights: configuration, tokenizer, chat templates, licence. Torch-free."""

from __future__ import annotations

import codecs
import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xrl.config.json_file import read_json_object
from xrl.weights.weight_files import is_own, is_weights

logger = logging.getLogger(__name__)

# A larger folder is no part of a model, such as data where a project is the model's folder.
MAX_FOLDER_BYTES = 64 * 2**20
# Parts of config.json with number formats of their own: what another library loads, what was quantised.
_FOREIGN_PARTS = ("transformers.js_config", "quantization_config")
# Said of what was left out.
_NAMED = 8


@dataclass(frozen=True, kw_only=True)
class OtherFiles:
    """What travels along with a model, and what does not."""

    copied: tuple[Path, ...]  # files, below the model's folder
    left_out: tuple[Path, ...]  # files and whole folders, but for the model's own weights and hidden names

    def num_bytes(self) -> int:
        """Bytes of the copies."""
        return sum(path.stat().st_size for path in self.copied)


def find_other_files(source: Path, *, target: Path) -> OtherFiles:
    """Everything in a model's folder but weights, folders that hold weights or are large, and hidden names.

    Links to files are followed, because the hub's cache is made of them; links to folders are not.

    Args:
        target: where the copies are to go; a folder around it is nothing of the model's.
    """
    left_out: list[Path] = []
    copied = list(_walk(source, Path(os.path.abspath(target)), left_out))
    return OtherFiles(
        copied=tuple(copied),
        left_out=tuple(path for path in left_out if path.parent != source or not is_own(path.name)),
    )


def copy_other_files(source: Path, target: Path, dtype: str | None = None) -> None:
    """Copy what `find_other_files` finds, and say what is left out.

    Args:
        dtype: what config.json is to say of the weights; None: what it says already.
    """
    found = find_other_files(source, target=target)
    left_out = list(found.left_out)
    for path in found.copied:
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            opened = path.open("rb")
        except OSError:  # no reason to lose the weights
            left_out.append(path)
            continue
        with opened, copy.open("wb") as written:
            start = opened.read(len(codecs.BOM_UTF8))
            if start != codecs.BOM_UTF8 or path.suffix != ".json":  # transformers reads no JSON behind such a mark
                written.write(start)
            shutil.copyfileobj(opened, written)
    if dtype is not None:
        config = _with_dtype(read_json_object(source / "config.json"), dtype)
        # transformers 5 says "dtype", older checkpoints "torch_dtype".
        config = config if {"dtype", "torch_dtype"} & config.keys() else config | {"dtype": dtype}
        (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if left_out:
        names = ", ".join(str(path.relative_to(source)) for path in left_out[:_NAMED])
        more = f" and {len(left_out) - _NAMED} more" if len(left_out) > _NAMED else ""
        logger.warning("not copied from %s, because weights or no part of a model: %s%s", source, names, more)


def _walk(folder: Path, target: Path, left_out: list[Path]) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == "__pycache__":
            continue
        if not path.is_dir():
            if path.is_file() and not is_weights(path.name):
                yield path
            else:  # weights, links to nowhere, pipes
                left_out.append(path)
        elif path.is_symlink() or _is_foreign(path):
            left_out.append(path)
        elif not target.is_relative_to(os.path.abspath(path)):
            yield from _walk(path, target, left_out)


def _is_foreign(folder: Path) -> bool:
    """Whether a folder holds weights (of another format, of a checkpoint in training), is large, or cannot be read."""
    num_bytes = 0
    try:
        for parent, _, names in os.walk(folder, onerror=_raise):
            for name in names:
                if is_weights(name):
                    return True
                path = Path(parent, name)
                num_bytes += path.stat().st_size if path.is_file() else 0
                if num_bytes > MAX_FOLDER_BYTES:
                    return True
    except PermissionError:  # of the machine's administrator, where a whole disk is the model's folder
        return True
    return False


def _raise(error: OSError) -> None:
    raise error


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Both spellings of the number format, wherever they stand, configs of parts included."""
    return {
        name: dtype
        if name in ("dtype", "torch_dtype")
        else _with_dtype(value, dtype)
        if isinstance(value, dict) and name not in _FOREIGN_PARTS
        else value
        for name, value in config.items()
    }
