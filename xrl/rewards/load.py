"""From a name on the command line to a judge's function."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from xrl.config import SettingsError
from xrl.rewards.blame import place_raised, words_of
from xrl.rewards.judge import Judge, TruthCheck


def load_judge(reference: str) -> Judge:
    """Import a judge.

    Args:
        reference: `package.module:function` or `path/to/file.py:function`; modules next to the file, and those in
            the current folder, can be imported too.

    Raises:
        SettingsError: the module or file is missing or cannot be imported, or has no such function.
    """
    return load_with_check(reference)[0]


def load_truth_check(reference: str) -> TruthCheck | None:
    """Import a judge's check of ground truths: `check_truth` of the judge itself, or of its module; None without one.

    Raises:
        SettingsError: as `load_judge` does.
    """
    return load_with_check(reference)[1]


def load_with_check(reference: str) -> tuple[Judge, TruthCheck | None]:
    """Both at once: a file is run anew each time it is imported.

    Raises:
        SettingsError: as `load_judge` does.
    """
    module, judge = _load(reference)
    check = getattr(judge, "check_truth", None) or getattr(module, "check_truth", None)
    return judge, check if callable(check) else None


def check_reference(reference: str) -> None:
    """Refuse what can be seen to be no judge without running any of it.

    Raises:
        SettingsError: it has not the form of a reference, or there is no such file.
    """
    source, _ = _parts(reference)
    if source.endswith(".py") and not Path(source).expanduser().is_file():
        raise SettingsError(f"--judge: no file {Path(source).expanduser()}")


def _parts(reference: str) -> tuple[str, str]:
    source, _, name = reference.rpartition(":")
    if not source or not name:
        raise SettingsError(f"--judge {reference} must be package.module:function or path/file.py:function")
    return source, name


def _load(reference: str) -> tuple[ModuleType, Judge]:
    source, name = _parts(reference)
    # Running user code: whatever is raised at import is the user's to mend, and only what and where is worth showing.
    try:
        module = _import_file(Path(source).expanduser()) if source.endswith(".py") else _import_module(source)
    except SettingsError:
        raise
    except (Exception, SystemExit) as error:
        place = place_raised(error)
        raise SettingsError(
            f"--judge {reference}: cannot import {source}: {type(error).__name__}: {words_of(error)}"
            f"{f' ({place})' if place else ''}"
        ) from error
    if not hasattr(module, name):
        raise SettingsError(f"--judge {reference}: {source} has no function {name!r}")
    judge: Judge = getattr(module, name)
    if not callable(judge):
        raise SettingsError(f"--judge {reference}: {name} in {source} is a {type(judge).__name__}, not a function")
    return module, judge


def _import_module(name: str) -> ModuleType:
    # Started as a console script, Python does not look in the current folder by itself.
    _look_in(Path.cwd())
    return importlib.import_module(name)


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise SettingsError(f"--judge: no file {path}")
    _look_in(path.resolve().parent)
    spec = importlib.util.spec_from_file_location(f"xrl_judge_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    # Registered before it runs, as dataclasses, for one, look modules up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _look_in(folder: Path) -> None:
    # At the end: a user's file must not hide an installed package.
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
