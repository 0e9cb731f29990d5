"""Judges that misbehave, for the pool's tests."""

import ctypes
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping

import hostile

from xrl.types import Prompt

NOT_A_FUNCTION = 3


class EndOfAll(BaseException):
    def __str__(self) -> str:
        raise KeyboardInterrupt


def raises(error: BaseException) -> object:
    raise error


def length(response: str, prompt: Prompt) -> float:
    return len(response)


def as_told(response: str, prompt: Prompt) -> object:
    """Does what the answer says."""
    actions: Mapping[str, object] = {
        "hang": lambda: time.sleep(3600),
        "hang in C": lambda: re.match(r"(a+)+$", "a" * 64 + "b"),  # never lets another Python thread run
        "raise": lambda: 1 / 0,
        "raise more": lambda: raises(EndOfAll()),
        "interrupt": lambda: raises(KeyboardInterrupt()),
        "surrogate": lambda: raises(ValueError("\n\ud800")),
        "exit": lambda: sys.exit(3),
        "vanish": lambda: os._exit(7),
        "segfault": lambda: ctypes.string_at(0),
        "nan": lambda: float("nan"),
        "text": lambda: "1.0",
        "nothing": lambda: None,
        "torch?": lambda: float("torch" in sys.modules),
        "main": lambda: float(hasattr(sys.modules["__main__"], "pytest")),
        "pid": os.getpid,
        **hostile.ACTIONS,
    }
    if response in actions:
        return actions[response]()  # type: ignore[operator]
    return hostile.WITH_A_FILE[response](prompt.extra.get("file"))


def leaves_another(response: str, prompt: Prompt) -> float:
    """Writes its child's id to a file, then ends."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    with open(response, "w") as file:
        file.write(f"{child.pid}\n")
    os._exit(7)


def starts_another(response: str, prompt: Prompt) -> float:
    """Writes its id and its child's to a file, then hangs."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    with open(response, "w") as file:
        file.write(f"{os.getpid()} {child.pid}\n")
    time.sleep(3600)
    return 0.0
