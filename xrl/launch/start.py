"""What every process of a run does first, before anything heavy is imported."""

from __future__ import annotations

import warnings

from xrl.launch.descriptors import raise_limit
from xrl.launch.streams import prepare_streams
from xrl.launch.terminal import show_uncaught_printable


def prepare_process() -> None:
    """Standard streams that can be written to, as many open files as allowed, and printable tracebacks."""
    prepare_streams()
    raise_limit()
    show_uncaught_printable()
    forgive_warnings_of_others()


def forgive_warnings_of_others() -> None:
    """Where warnings are to be errors (`PYTHONWARNINGS=error`), only those about our own code are: others are shown.

    What megatron-core or a judge's library has to say about itself is no reason to lose a run.
    """
    if any(action == "error" for action, *_ in warnings.filters):
        warnings.filterwarnings("default", module=r"(?!xrl(\.|$))")
