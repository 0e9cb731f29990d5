"""From a reference on the command line, `package.module:name` or `path/to/file.py:name`, to what it names."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from xrl.config import SettingsError
from xrl.files.blame import location_raised, words_of


@dataclass(frozen=True, kw_only=True)
class ReferenceKind:
    """What a flag's references name."""

    flag: str  # "--judge"
    noun: str  # "function"; stands for the name in a sentence on how a reference is written

    def check(self, reference: str) -> None:
        """Refuse a reference that names nothing, as far as that shows without running any of it.

        Raises:
            SettingsError: it has not the form of a reference, or there is no such file.
        """
        source, _ = self.parts(reference)
        if source.endswith(".py") and not Path(source).expanduser().is_file():
            raise SettingsError(f"{self.flag}: no file {Path(source).expanduser()}")

    def parts(self, reference: str) -> tuple[str, str]:
        """(module or file, name in it).

        Raises:
            SettingsError: it has not the form of a reference.
        """
        source, _, name = reference.rpartition(":")
        if not source or not name:
            raise SettingsError(
                f"{self.flag} {reference} must be package.module:{self.noun} or path/file.py:{self.noun}"
            )
        return source, name

    def load(self, reference: str) -> tuple[ModuleType, object]:
        """Import what a reference names: (its module, the thing itself).

        Modules next to a file, and those in the current folder, can be imported too. A file is run anew each time.

        Raises:
            SettingsError: the module or file is missing or cannot be imported, or has nothing of that name.
        """
        source, name = self.parts(reference)
        # Running user code: whatever is raised at import is the user's to mend, and only what and where is worth
        # showing.
        try:
            module = self._import_file(Path(source).expanduser()) if source.endswith(".py") else _import_module(source)
        except SettingsError:
            raise
        except (Exception, SystemExit) as error:
            location = location_raised(error)
            raise SettingsError(
                f"{self.flag} {reference}: cannot import {source}: {type(error).__name__}: {words_of(error)}"
                f"{f' ({location})' if location else ''}"
            ) from error
        if not hasattr(module, name):
            raise SettingsError(f"{self.flag} {reference}: {source} has no {self.noun} {name!r}")
        return module, getattr(module, name)

    def _import_file(self, path: Path) -> ModuleType:
        if not path.is_file():
            raise SettingsError(f"{self.flag}: no file {path}")
        _look_in(path.resolve().parent)
        spec = importlib.util.spec_from_file_location(f"xrl_{self.flag.lstrip('-')}_{path.stem}", path)
        assert spec is not None and spec.loader is not None  # the name ends in .py
        module = importlib.util.module_from_spec(spec)
        # Registered before it runs, as dataclasses, for one, look modules up there.
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module


def _import_module(name: str) -> ModuleType:
    # Started as a console script, Python does not look in the current folder by itself.
    _look_in(Path.cwd())
    return importlib.import_module(name)


def _look_in(folder: Path) -> None:
    # At the end: a user's file must not hide an installed package.
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
