"""Where the main thread is, as another thread sees it."""

from __future__ import annotations

import sys
import sysconfig
import threading
from pathlib import Path
from types import FrameType

_PACKAGE = f"{Path(__file__).resolve().parents[1]}/"
_LIBRARIES = tuple({f"{sysconfig.get_path(name)}/" for name in ("stdlib", "platstdlib", "purelib", "platlib")})
# What a file's name is shown without: libraries may lie below the folder that ours lies in.
_FOLDERS = sorted({*_LIBRARIES, f"{Path(__file__).resolve().parents[2]}/"}, key=len, reverse=True)


def main_thread_frames() -> tuple[str, str]:
    """(innermost frame of our code or the user's, innermost frame of all): "xrl/trainer.py:110 step"; empty: none."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    innermost, own = frame, frame
    while own is not None and not _is_own(own):
        own = own.f_back
    return (_place(own) if own else "", _place(innermost) if innermost else "")


def _is_own(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    if file.startswith("<"):
        return False
    # Our package may be installed among the libraries.
    return file.startswith(_PACKAGE) or not file.startswith(_LIBRARIES)


def _place(frame: FrameType) -> str:
    file = frame.f_code.co_filename
    folder = next((folder for folder in _FOLDERS if file.startswith(folder)), "")
    return f"{file.removeprefix(folder)}:{frame.f_lineno} {frame.f_code.co_name}"
