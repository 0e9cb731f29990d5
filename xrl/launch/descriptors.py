"""How many files and connections this process may have open, and how many of them requests may take."""

from __future__ import annotations

import contextlib
import os
import resource

# More are never needed: fifty workers with a thousand requests each. A hard limit of a billion, as containers have it,
# would cost those programs minutes that close every number they might have inherited.
MOST = 65_536
# Left over for shared memory, pipes of judges and workers, and the files of a checkpoint.
RESERVE = 64
RESERVED_SHARE = 4


def raise_limit() -> None:
    """Raise the soft limit of open files to the hard one; processes that are started from here inherit it.

    Judges too: descriptors are numbered from the lowest free one, so `select` in them breaks only where the old limit
    would have.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    with contextlib.suppress(ValueError, OSError):  # some systems allow less than they say
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def limit() -> int:
    """Most descriptors that this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST if soft == resource.RLIM_INFINITY else min(soft, MOST)


def spare_connections() -> int:
    """Connections that may be open at once, at least one, so that enough descriptors are left for all else."""
    return max(1, limit() - _num_open() - max(RESERVE, limit() // RESERVED_SHARE))


def _num_open() -> int:
    try:
        return len(os.listdir("/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"))
    except OSError:
        return RESERVE  # about what a process with torch in it has
