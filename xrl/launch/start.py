"""What every process of a run does first, before anything heavy is imported."""

from __future__ import annotations

import contextlib
import gc
import signal
import warnings
from collections.abc import Iterator

from xrl.launch.descriptors import raise_limit
from xrl.launch.streams import prepare_streams
from xrl.launch.terminal import show_foreign_text_printable


def prepare_process() -> None:
    """Standard streams that can be written to, SIGINT, as many open files as allowed, and printable messages."""
    prepare_streams()
    hear_interrupts()
    raise_limit()
    show_foreign_text_printable()
    forgive_warnings_of_others()


def hear_interrupts() -> None:
    """A shell starts background commands with SIGINT ignored, and Python leaves it at that; it shall stop a command
    from its first second, its checks of data and model too."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def forgive_warnings_of_others() -> None:
    """Where warnings are to be errors (`PYTHONWARNINGS=error`), only those about our own code are: others are shown.

    What megatron-core or a judge's library has to say about itself is no reason to lose a run.
    """
    if any(action == "error" for action, *_ in warnings.filters):
        warnings.filterwarnings("default", module=r"(?!xrl(\.|$))")


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Import large libraries in such a block: they make a million objects that stay, and the garbage collector goes
    through them over and over, a fifth of the time that the imports take."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
