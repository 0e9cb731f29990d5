"""Ranks that hear of each other while they wait: one that is stopped or hangs is named, and ends the run.

A collective that waits for a rank says neither for whom nor why, and ranks wait for rank 0 as long as a rollout takes,
which nobody knows. So every rank beats: it writes what it is at to the store, and reads what the others wrote.

    beat thread     beats, reads, answers who asks; for all of that it uses the store, and may hang with it: a store's
                    client on a link that is cut never returns, whatever its time-out
    watch thread    looks at the clock, and at what the other thread has read last; never waits for anyone, and ends
                    the process

Rank 0 listens to all, the others to rank 0. What is in the store:

    xrl/beat/<rank>         its last beat
    xrl/asked               how often reports were asked for: by rank 0, which sees a hang, or by `xrl doctor`
    xrl/report/<n>/<rank>   its answer to the n-th time: where its main thread is, and in which collective
    xrl/end                 the sentence with which rank 0 ends the run: the others follow, and need not say it again
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from xrl.launch.beats import Beat, Trouble, World
from xrl.launch.hang import Hang, Pending, RankReport
from xrl.launch.limits import Limits
from xrl.launch.progress import Progress
from xrl.launch.stack import main_thread_frames

BEAT_INTERVAL_S = 5.0
# A rank that was asked for a report beats faster for a while: the end, or the next question, comes soon.
FAST_INTERVAL_S = 0.25
FAST_S = 30.0
# A rank that gets nothing done looks so often at its collectives.
LOOK_INTERVAL_S = 30.0
# From a hang that was seen to the end of rank 0: the reports, and the word of the end. With the time to see one, to say
# it and write it down, and to end, that is less than 30 s.
REPORTS_LIMIT_S = 10.0
END_LIMIT_S = 2.0

ASKED_KEY = "xrl/asked"
END_KEY = "xrl/end"


class Store(Protocol):
    """What the watch needs of torch's TCPStore."""

    def set(self, key: str, value: str) -> None:
        """Write."""

    def get(self, key: str) -> bytes:
        """Read; waits for the key to be written, no longer than the store's time-out."""

    def check(self, keys: list[str]) -> bool:
        """Whether all of them have been written."""

    def add(self, key: str, amount: int) -> int:
        """Add to a number, 0 where there is none, and return the sum."""


def beat_key(rank: int) -> str:
    """Where a rank's beat is."""
    return f"xrl/beat/{rank}"


def report_key(time_asked: int, rank: int) -> str:
    """Where a rank's answer is to the n-th time that it is asked, from 1."""
    return f"xrl/report/{time_asked}/{rank}"


def _no_collectives() -> Sequence[Pending]:
    return ()


@dataclass(frozen=True, kw_only=True)
class Self:
    """What this process knows of itself."""

    rank: int
    progress: Progress
    pending: Callable[[], Sequence[Pending]] = _no_collectives  # that have not ended
    host: str = field(default_factory=socket.gethostname)

    def beat(self, number: int, *, overdue_s: float = 0.0) -> Beat:
        """The beat of this moment."""
        progress = self.progress
        return Beat(
            number=number,
            host=self.host,
            pid=os.getpid(),
            phase=progress.phase,
            kind=progress.kind,
            phase_s=time.monotonic() - progress.since,
            pieces=progress.pieces,
            overdue_s=overdue_s,
        )

    def report(self) -> RankReport:
        """Where the main thread is, and what it waits for."""
        own_frame, frame = main_thread_frames()
        return RankReport(
            rank=self.rank,
            beat=self.beat(0),
            own_frame=own_frame,
            frame=frame,
            waits_for=self._waits_for(),
            pending=tuple(self.pending()),
        )

    def _waits_for(self) -> str:
        try:
            return self.progress.waits_for()
        except RuntimeError:  # what it looks at has changed meanwhile
            return ""


class Watch:
    """The two threads of one rank."""

    def __init__(
        self,
        connect: Callable[[], Store],
        me: Self,
        *,
        world_size: int,
        limits: Limits,
        tell: Callable[[Hang], None],
        end: Callable[[Hang | None], None],
        overdue_s: Callable[[Pending], float] = lambda pending: 0.0,
        beat_interval_s: float = BEAT_INTERVAL_S,
    ) -> None:
        """
        Args:
            connect: makes a client of the store, of which nobody else makes use.
            me: this rank.
            tell: is told of a hang, once, in a thread of the watch, before the others are told that the run ends.
            end: ends the process, in a thread of the watch, when that is done; with None, rank 0 has told of the hang.
            overdue_s: how long a collective has waited where that is longer than it may, else 0.
        """
        self._connect, self._me, self._overdue_s = connect, me, overdue_s
        self._tell, self._end = tell, end
        self._limits, self._beat_interval_s = limits, beat_interval_s
        self._leads, self._world_size = me.rank == 0, world_size
        self._others = [other for other in range(world_size) if other != me.rank] if self._leads else [0]
        listened_to = range(world_size) if self._leads else [0]
        self._world = World(listened_to, now=time.monotonic(), limits=limits)
        self._lock = threading.Lock()  # around the world
        self._own_overdue_s = 0.0
        self._stopping = threading.Event()
        # Rank 0: what its watch thread wants of the store, and its beat thread has found there.
        self._wants_reports, self._wake = threading.Event(), threading.Event()
        self._reports: dict[int, RankReport] = {}
        self._last_words: str | None = None
        self._has_said_end = threading.Event()
        for loop, name in ((self._beat, "beat"), (self._watch, "watch")):
            threading.Thread(target=loop, name=name, daemon=True).start()

    def close(self) -> None:
        """Miss nobody any more: the others end as well, each in its time."""
        self._stopping.set()
        self._wake.set()

    def _beat(self) -> None:
        talk: _Talk | None = None
        looks = _Looks(self._me, self._overdue_s)
        number = 0
        while not self._stopping.is_set():
            self._own_overdue_s = looks.overdue_s()
            beat = self._me.beat(number, overdue_s=self._own_overdue_s)
            number += 1
            try:
                talk = talk or _Talk(self._connect(), self._me)
                self._exchange(talk, beat)
            except (RuntimeError, ValueError, OSError):  # no store, no beats: the watch will say so
                talk = None
            is_fast = self._wants_reports.is_set() or (talk is not None and talk.was_asked_lately)
            self._wake.wait(min(FAST_INTERVAL_S, self._beat_interval_s) if is_fast else self._beat_interval_s)
            self._wake.clear()

    def _exchange(self, talk: _Talk, beat: Beat) -> None:
        """One round of what this rank has to say, and to hear."""
        if self._world_size > 1:
            talk.beat(beat)
        for other in self._others:
            heard = talk.heard(other)
            if heard is not None:
                self._hear(other, heard)
        talk.answer()
        if self._leads and self._wants_reports.is_set():
            for other in self._others:
                report = None if other in self._reports else talk.report_of(other)
                if report is not None:
                    self._reports[other] = report
        if self._last_words is not None:
            talk.end(self._last_words)
            self._has_said_end.set()
        if not self._leads and talk.has_ended and not self._stopping.is_set():
            self._end(None)

    def _hear(self, rank: int, beat: Beat) -> None:
        with self._lock:
            self._world.hear(rank, beat, now=time.monotonic())

    def _watch(self) -> None:
        last, number = time.monotonic(), 0
        while not self._stopping.wait(self._beat_interval_s):
            with self._lock:
                last, before, number = time.monotonic(), last, number + 1
                if last - before > self._beat_interval_s + self._limits.silence_s / 4:
                    self._world.begin_again(now=last)
                if self._leads:  # of itself it hears without the store
                    self._world.hear(0, self._me.beat(number, overdue_s=self._own_overdue_s), now=last)
                trouble = self._world.trouble(now=last, all_ranks=self._leads)
            if trouble is not None and not self._stopping.is_set():
                hang = self._examined(trouble)
                self._tell(hang)
                self._say_end(hang)
                self._end(hang)
                return

    def _examined(self, trouble: Trouble) -> Hang:
        """What all ranks that can say so are at."""
        own = self._me.report()
        if not self._leads:
            return Hang.of(trouble, [own, *(self._last_of(rank) for rank in trouble.silent)])
        expected = set(self._others) - set(trouble.silent)
        self._wants_reports.set()
        self._wake.set()
        _wait(lambda: expected <= self._reports.keys(), limit_s=REPORTS_LIMIT_S)
        found = [self._reports[rank] if rank in self._reports else self._last_of(rank) for rank in self._others]
        return Hang.of(trouble, [own, *found])

    def _say_end(self, hang: Hang) -> None:
        """Rank 0: to the others, which end then."""
        if self._leads and self._others:
            self._last_words = hang.sentence
            self._wake.set()
            _wait(self._has_said_end.is_set, limit_s=END_LIMIT_S)

    def _last_of(self, rank: int) -> RankReport:
        """Of one that has not answered."""
        with self._lock:
            silent_s = self._world.silent_s(rank, now=time.monotonic())
            return RankReport(rank=rank, beat=self._world.beat(rank), silent_s=silent_s)


class _Talk:
    """What one rank says and hears through its client of the store."""

    def __init__(self, store: Store, me: Self) -> None:
        self._store, self._me = store, me
        self._num_answered = 0
        self._asked_at = -FAST_S
        self._asks: int | None = None  # which of the questions is ours

    @property
    def was_asked_lately(self) -> bool:
        return time.monotonic() - self._asked_at < FAST_S

    @property
    def has_ended(self) -> bool:
        return self._store.check([END_KEY])

    def beat(self, beat: Beat) -> None:
        self._store.set(beat_key(self._me.rank), beat.to_json())

    def heard(self, rank: int) -> Beat | None:
        key = beat_key(rank)
        return Beat.from_json(self._store.get(key)) if self._store.check([key]) else None

    def answer(self) -> None:
        """Say where this rank is, where somebody has asked."""
        num_asked = self._num_asked()
        if num_asked > self._num_answered:
            self._num_answered, self._asked_at = num_asked, time.monotonic()
            self._store.set(report_key(num_asked, self._me.rank), self._me.report().to_json())

    def report_of(self, rank: int) -> RankReport | None:
        """Another rank's answer; asks with the first call."""
        if self._asks is None:
            self._asks = self._store.add(ASKED_KEY, 1)
        key = report_key(self._asks, rank)
        return RankReport.from_json(self._store.get(key)) if self._store.check([key]) else None

    def end(self, sentence: str) -> None:
        self._store.set(END_KEY, sentence)

    def _num_asked(self) -> int:
        return int(self._store.get(ASKED_KEY)) if self._store.check([ASKED_KEY]) else 0


class _Looks:
    """How long this rank's collectives have waited: looked at now and then, while it gets nothing done."""

    def __init__(self, me: Self, overdue_s: Callable[[Pending], float]) -> None:
        self._me, self._overdue_s_of = me, overdue_s
        self._pieces, self._looked_at, self._found_s = -1, 0.0, 0.0

    def overdue_s(self) -> float:
        """The longest that one of them has waited beyond what it may; 0: none has."""
        now, pieces = time.monotonic(), self._me.progress.pieces
        if pieces != self._pieces:
            self._pieces, self._looked_at, self._found_s = pieces, now, 0.0
        elif now - self._looked_at > LOOK_INTERVAL_S:
            self._looked_at = now
            self._found_s = max(map(self._overdue_s_of, self._me.pending()), default=0.0)
        return self._found_s


def _wait(is_done: Callable[[], bool], *, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not is_done() and time.monotonic() < deadline:
        time.sleep(0.05)
