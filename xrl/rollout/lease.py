"""One run at a time: a worker is the first run's that calls, until it says goodbye or has been silent for a while."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime

from xrl.rollout.access import WorkerInUse

# A trainer says every so often that it is still there: it may compute for many minutes between two updates.
KEEP_ALIVE_S = 10.0
# After such a silence the trainer is dead, or its host is cut off. Another run may have the worker then.
LEASE_S = 60.0


class Lease:
    """Which run has the worker. Used by one thread."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.run_id: str | None = None
        self.since: datetime | None = None  # by this host's clock, for people
        self._clock = clock
        self._heard = 0.0

    def take(self, run_id: str) -> bool:
        """The worker is this run's, and its time begins anew; returns whether it was not this run's before.

        Raises:
            WorkerInUse: another run has it.
        """
        if self.run_id != run_id:
            self.check_free_for(run_id)
            self.run_id, self.since = run_id, datetime.now()
            self._heard = self._clock()
            return True
        self._heard = self._clock()
        return False

    def check_free_for(self, run_id: str) -> None:
        """Refuse as `take` does, without taking the worker. The holder's time begins anew."""
        if self.run_id == run_id:
            self._heard = self._clock()
            return
        left = self._heard + LEASE_S - self._clock()
        if self.run_id is None or self.since is None or left <= 0:
            return
        raise WorkerInUse(
            f"in use by run {self.run_id} since {self.since:%H:%M:%S}: wait for its end, or use another worker (a run "
            f"that was killed frees it after {LEASE_S:g} s of silence, {left:.0f} s from now)"
        )

    def give_back(self, run_id: str) -> None:
        """The run needs the worker no more; nothing happens where it does not have it."""
        if self.run_id == run_id:
            self.run_id = self.since = None
