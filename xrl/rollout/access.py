"""Who may use a worker: whoever shows its key, one run at a time. Imports no torch.

A worker that a trainer starts gets a key of its own, through its environment: arguments can be read by everybody on the
host. A worker that a person starts, and trainers that use it, read one from a file that nobody else may read.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path

from xrl.config.errors import SettingsError

KEY_VARIABLE = "XRL_WORKER_KEY"
RUN_HEADER = "X-XRL-Run"
# A key of ours has 256 bits, as hexadecimal digits.
KEY_BYTES = 32
# What a key of somebody else's making must be like, to be a header that nobody guesses.
_KEY = re.compile(r"[A-Za-z0-9._~+/=-]{32,512}")
_RUN_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_HOW_TO_MAKE = "`(umask 077; openssl rand -hex 32 > {file})` makes one"


@dataclass(frozen=True, kw_only=True)
class Access:
    """What every call shows a worker: its key and its run."""

    key: str = field(repr=False)
    run_id: str

    @property
    def headers(self) -> Mapping[str, str]:
        """The HTTP headers of a call."""
        return {"Authorization": f"Bearer {self.key}", RUN_HEADER: self.run_id}


class AccessDenied(Exception):
    """A call that the worker does not serve: it shows no key, or another one, or comes from a web page."""


class WorkerInUse(Exception):
    """A call of one run while the worker serves another."""


def new_key() -> str:
    """A key that nobody guesses."""
    return secrets.token_hex(KEY_BYTES)


def new_run_id(name: str = "") -> str:
    """A name for a run that no other run has.

    Args:
        name: by which people know the run, such as that of its folder. Left out where it is no plain word.
    """
    number = secrets.token_hex(8)
    return f"{name}-{number}" if is_run_id(name) and len(name) <= 64 else number


def is_run_id(text: str) -> bool:
    """Whether a run may have this name."""
    return _RUN_ID.fullmatch(text) is not None


def take_key_from(environment: MutableMapping[str, str]) -> str | None:
    """The key that a trainer gave to a worker of its own, which then forgets it: engines start programs too.

    Raises:
        SettingsError: it is no key.
    """
    key = environment.pop(KEY_VARIABLE, None)
    return None if key is None else _checked(key, f"the variable {KEY_VARIABLE}")


def shared_key(file: Path | None, *, flag: str) -> str:
    """The key that workers started by hand share with their trainers.

    Args:
        file: that holds it; None: the user's own, which is made at its first use.
        flag: that names the file, for errors.

    Raises:
        SettingsError: there is no such file, others can read it, or it holds no key.
    """
    if file is not None:
        return _read(file, f"{flag} {file}")
    file = default_key_file(flag)
    if not os.path.lexists(file):
        _make(file, flag)
    return _read(file, f"the key of workers, {file},")


def default_key_file(flag: str) -> Path:
    """`~/.config/xrl/worker.key`, or where XDG_CONFIG_HOME says: trainers and workers of one user find it there.

    Raises:
        SettingsError: the user has no home.
    """
    try:
        folder = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    except RuntimeError as error:
        raise SettingsError(f"the key of workers needs a home folder, and there is none: give {flag} FILE") from error
    return Path(folder) / "xrl" / "worker.key"


def _make(file: Path, flag: str) -> None:
    """A new key file, whole from its first moment: the other side may be at its first use too."""
    draft = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as written:
                written.write(f"{new_key()}\n")
            with contextlib.suppress(FileExistsError):  # the other side was first
                os.link(draft, file)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise SettingsError(
            f"the key of workers cannot be written to {file}: {error.strerror or error}: give {flag} FILE; "
            f"{_HOW_TO_MAKE.format(file='FILE')}"
        ) from error


def _read(file: Path, what: str) -> str:
    try:
        # Not to wait for whoever writes to a pipe of that name.
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as opened:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise SettingsError(f"{what} must be a file with a key, and is none")
            if status.st_mode & 0o077:
                raise SettingsError(
                    f"{what} has mode {status.st_mode & 0o777:04o}, so that others can use the workers: "
                    f"`chmod 600 {file}`, and make a new key if others may have read it"
                )
            text = opened.read(1024).decode("ascii", errors="replace")
    except FileNotFoundError as error:
        raise SettingsError(f"{what} does not exist: {_HOW_TO_MAKE.format(file=file)}") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise SettingsError(f"{what} cannot be read: {reason}") from error
    return _checked(text.strip(), what, file)


def _checked(key: str, what: str, file: Path | None = None) -> str:
    if _KEY.fullmatch(key) is None:
        made = f": {_HOW_TO_MAKE.format(file=file)}" if file is not None else ""
        raise SettingsError(f"{what} must hold one key of 32 to 512 letters, digits or ._~+/=-, found none{made}")
    return key
