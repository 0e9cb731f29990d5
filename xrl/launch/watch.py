"""Ranks that hear of each other while they wait: one that is stopped or hangs is named, and ends the run.

A collective that waits for a rank says neither for whom nor why, and ranks wait for rank 0 as long as a rollout takes,
which nobody knows. So every rank beats: it writes what it is at to the store, and reads what the others wrote.

    beat thread     writes this rank's beat, reads those of the ranks it waits for        may hang with the store
    watch thread    looks at the clock, and at what the other thread has read last        never waits for anyone

Rank 0 hears of all, the others of rank 0. A rank is missed in one of two ways: no beat comes (its process is stopped,
its host is gone), or rank 0 beats and gets nothing done, longer than any of its own time-outs.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from xrl.launch.progress import Progress

BEAT_INTERVAL_S = 5.0
# A process computes in C for seconds without letting another thread run, on a busy machine for tens of seconds.
SILENCE_LIMIT_S = 120.0


class Store(Protocol):
    """What the watch needs of torch's TCPStore."""

    def set(self, key: str, value: str) -> None:
        """Write."""

    def get(self, key: str) -> bytes:
        """Read; waits for the key to be written, no longer than the store's time-out."""

    def check(self, keys: list[str]) -> bool:
        """Whether all of them have been written."""


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank says of itself."""

    number: int
    phase: str
    pieces: int

    def to_json(self) -> str:
        """One line."""
        return json.dumps({"number": self.number, "phase": self.phase, "pieces": self.pieces})

    @staticmethod
    def from_json(text: str | bytes) -> Beat:
        """The opposite.

        Raises:
            ValueError, KeyError: it is none.
        """
        said = json.loads(text)
        return Beat(number=int(said["number"]), phase=str(said["phase"]), pieces=int(said["pieces"]))


class Silence:
    """What is known of the ranks that this one waits for, and which of them is missed. Times in seconds, monotonic."""

    def __init__(self, ranks: Sequence[int], *, now: float, silence_limit_s: float, lead_limit_s: float) -> None:
        """
        Args:
            ranks: that are heard of.
            silence_limit_s: longest time without a beat.
            lead_limit_s: longest time in which rank 0 gets nothing done.
        """
        self.silence_limit_s, self.lead_limit_s = silence_limit_s, lead_limit_s
        self._beats: dict[int, Beat] = {}
        self._heard = dict.fromkeys(ranks, now)
        self._moved = dict.fromkeys(ranks, now)

    def hear(self, rank: int, beat: Beat, *, now: float) -> None:
        """What `rank` has written last."""
        last = self._beats.get(rank)
        if last is None or beat.number != last.number:
            self._heard[rank] = now
        if last is None or (beat.phase, beat.pieces) != (last.phase, last.pieces):
            self._moved[rank] = now
        self._beats[rank] = beat

    def begin_again(self, *, now: float) -> None:
        """After a time in which this rank could not listen, as the whole job was suspended, say."""
        self._heard, self._moved = dict.fromkeys(self._heard, now), dict.fromkeys(self._moved, now)

    def missed(self, *, now: float) -> str | None:
        """A sentence about the rank that is missed, the longest silent first; None as long as none is."""
        rank, heard = min(self._heard.items(), key=lambda item: item[1])
        if now - heard > self.silence_limit_s:
            return (
                f"rank {rank} has not been heard of for {now - heard:.0f} s{self._at(rank)}: its process is stopped or "
                f"its host does not answer"
            )
        if 0 in self._moved and now - self._moved[0] > self.lead_limit_s:
            return f"rank 0 has got nothing done for {now - self._moved[0]:.0f} s{self._at(0)}"
        return None

    def _at(self, rank: int) -> str:
        beat = self._beats.get(rank)
        return f" ({beat.phase})" if beat else ""


class Watch:
    """The two threads of one rank."""

    def __init__(
        self,
        connect: Callable[[], Store],
        progress: Progress,
        *,
        rank: int,
        world_size: int,
        lead_limit_s: float,
        end: Callable[[str], None],
        beat_interval_s: float = BEAT_INTERVAL_S,
        silence_limit_s: float = SILENCE_LIMIT_S,
    ) -> None:
        """
        Args:
            connect: makes a client of the store, of which nobody else makes use.
            progress: this rank's.
            lead_limit_s: longest time in which rank 0 gets nothing done.
            end: is told of a rank that is missed, once, in a thread of the watch; ends the process.
        """
        self._connect, self._progress, self._end = connect, progress, end
        self._rank, self._beat_interval_s = rank, beat_interval_s
        self._others = [other for other in range(world_size) if other != rank] if rank == 0 else [0]
        self._silence = Silence(
            self._others, now=time.monotonic(), silence_limit_s=silence_limit_s, lead_limit_s=lead_limit_s
        )
        self._lock = threading.Lock()  # around the silence
        self._stopping = threading.Event()
        for loop, name in ((self._beat, "beat"), (self._watch, "watch")):
            threading.Thread(target=loop, name=name, daemon=True).start()

    def close(self) -> None:
        """Miss nobody any more: the others end as well, each in its time."""
        self._stopping.set()

    def _beat(self) -> None:
        number, store = 0, None
        while not self._stopping.is_set():
            try:
                store = store or self._connect()
                beat = Beat(number=number, phase=self._progress.phase, pieces=self._progress.pieces)
                store.set(_key(self._rank), beat.to_json())
                number += 1
                for other in self._others:
                    if store.check([_key(other)]):
                        heard = Beat.from_json(store.get(_key(other)))
                        with self._lock:
                            self._silence.hear(other, heard, now=time.monotonic())
            except (RuntimeError, ValueError, KeyError):  # no store, no beats: the watch will say so
                store = None
            self._stopping.wait(self._beat_interval_s)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._stopping.wait(self._beat_interval_s):
            with self._lock:
                last, before = time.monotonic(), last
                if last - before > self._beat_interval_s + self._silence.silence_limit_s / 4:
                    self._silence.begin_again(now=last)
                sentence = self._silence.missed(now=last)
            if sentence is not None and not self._stopping.is_set():
                self._end(sentence)
                return


def _key(rank: int) -> str:
    return f"xrl/beat/{rank}"
