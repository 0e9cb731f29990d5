"""Files that users hand over, read whole: regular ones of a sensible size, and never a pipe, which nobody may write to.

The checks before a run and the run itself read through here, so that they cannot disagree.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from xrl.config.errors import SettingsError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(file: Path, *, what: str = "") -> BinaryIO:
    """A regular file, open for reading.

    Args:
        what: how messages call it; default: by its path.

    Raises:
        SettingsError: there is none, it is of another kind, or it cannot be read.
    """
    what = what or str(file)
    try:
        # Without waiting for whoever writes to a pipe: what is opened is looked at first.
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        mode = os.fstat(descriptor).st_mode
    except OSError as error:
        raise SettingsError(f"{what} cannot be read: {error.strerror}") from error
    except ValueError as error:  # a name that no file can have
        raise SettingsError(f"{what} cannot be read: its name has characters that no file can have") from error
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise SettingsError(f"{what} is {_KINDS.get(stat.S_IFMT(mode), 'no file')}: a file is needed")
    return os.fdopen(descriptor, "rb")


def read_whole(file: Path, *, most_bytes: int, what: str = "") -> bytes:
    """The content of a regular file.

    Args:
        what: how messages call it; default: by its path.

    Raises:
        SettingsError: as `open_regular`, or it is larger than `most_bytes`.
    """
    what = what or str(file)
    with open_regular(file, what=what) as opened:
        try:
            size = os.fstat(opened.fileno()).st_size
            # Some files, those of /proc, have no size before they are read.
            content = b"" if size > most_bytes else opened.read(size + 1 if size else most_bytes + 1)
        except OSError as error:
            raise SettingsError(f"{what} cannot be read: {error.strerror}") from error
    if max(size, len(content)) > most_bytes:
        raise SettingsError(f"{what} is larger than the {most_bytes:,} bytes that such a file may have")
    return content
