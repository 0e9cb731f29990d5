"""The one error for anything a user can mend: one sentence, exit code 2."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from xrl.config.printable import one_line, shortened

# Of a sentence: enough for two of the longest paths there are.
MAX_CHARS = 10_000


class SettingsError(Exception):
    """Bad input. The message is one sentence: what, where, what was found, what is needed.

    No ValueError: parsers catch those, and print them in words of their own. What it quotes of files and flags is
    printable, and short enough to be read.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(shortened(one_line(sentence), MAX_CHARS))


@contextlib.contextmanager
def unreadable_files_refused() -> Iterator[None]:
    """Make SettingsErrors of what the system refuses about users' files: a closed folder, too long a name, a bad disk.

    Even to ask whether a file exists raises an error in these cases.

    Raises:
        SettingsError: naming the file, and what the system says about it.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:  # no file of anybody's
            raise
        raise SettingsError(f"{os.fsdecode(error.filename)} cannot be read: {error.strerror}") from error
