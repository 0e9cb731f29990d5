"""From a name on the command line to a judge's function."""

from __future__ import annotations

from types import ModuleType

from xrl.config import SettingsError
from xrl.files.references import ReferenceKind
from xrl.rewards.judge import Judge, TruthCheck

_JUDGE = ReferenceKind(flag="--judge", noun="function")


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
    """Import a judge and its check at once: a file is run anew each time it is imported.

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
    _JUDGE.check(reference)


def _load(reference: str) -> tuple[ModuleType, Judge]:
    module, found = _JUDGE.load(reference)
    if not callable(found):
        source, name = _JUDGE.parts(reference)
        raise SettingsError(f"--judge {reference}: {name} in {source} is a {type(found).__name__}, not a function")
    judge: Judge = found
    return module, judge
