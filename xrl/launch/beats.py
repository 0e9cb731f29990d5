"""What ranks say of themselves while they work, and when the silence or standstill of one is a hang: arithmetic alone.

Times are in seconds; points in time are of this process's monotonic clock.
"""

from __future__ import annotations

import json
import typing
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from xrl.launch.limits import Limits
from xrl.launch.progress import PhaseKind

# Ranks of one host fall silent together: a beat apart, and a little more.
TOGETHER_S = 6.0
KINDS: tuple[PhaseKind, ...] = typing.get_args(PhaseKind)


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank says of itself."""

    number: int  # of the beat
    host: str
    pid: int
    phase: str
    kind: PhaseKind
    phase_s: float  # in the phase, by now
    pieces: int
    overdue_s: float = 0.0  # that a collective of its has waited, where that is longer than it may; else 0

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Beat:
        """The opposite.

        Raises:
            ValueError: it is none.
        """
        return cls.from_fields(json.loads(text))

    @classmethod
    def from_fields(cls, fields: Any) -> Beat:
        """The opposite of `dataclasses.asdict`.

        Raises:
            ValueError: it is none.
        """
        try:
            return cls(
                number=int(fields["number"]),
                host=str(fields["host"]),
                pid=int(fields["pid"]),
                phase=str(fields["phase"]),
                kind=KINDS[KINDS.index(fields["kind"])],
                phase_s=float(fields["phase_s"]),
                pieces=int(fields["pieces"]),
                overdue_s=float(fields["overdue_s"]),
            )
        except (TypeError, KeyError) as error:
            raise ValueError(f"no beat of a rank: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """A hang, as far as beats tell."""

    sentence: str
    silent: tuple[int, ...] = ()  # ranks that are not heard of


class World:
    """What is known of the ranks that are listened to, and whether one is missed."""

    def __init__(self, ranks: Sequence[int], *, now: float, limits: Limits) -> None:
        """
        Args:
            ranks: that are listened to. A standstill is only seen where these are all.
        """
        self._limits = limits
        self._beats: dict[int, Beat] = {}
        self._heard = dict.fromkeys(ranks, now)
        self._moved = dict.fromkeys(ranks, now)

    def hear(self, rank: int, beat: Beat, *, now: float) -> None:
        """What `rank` has said last."""
        last = self._beats.get(rank)
        if last is None or beat.number != last.number:
            self._heard[rank] = now
        if last is None or (beat.phase, beat.pieces) != (last.phase, last.pieces):
            self._moved[rank] = now
        self._beats[rank] = beat

    def begin_again(self, *, now: float) -> None:
        """After a time in which this rank could not listen, as the whole job was suspended, say."""
        self._heard, self._moved = dict.fromkeys(self._heard, now), dict.fromkeys(self._moved, now)

    def beat(self, rank: int) -> Beat | None:
        """What `rank` has said last; None: nothing."""
        return self._beats.get(rank)

    def silent_s(self, rank: int, *, now: float) -> float:
        """How long it has not been heard of."""
        return now - self._heard[rank]

    def trouble(self, *, now: float, all_ranks: bool) -> Trouble | None:
        """The hang, if there is one by now.

        Args:
            all_ranks: whether every rank is listened to. Without, only silence is seen: others may wait for each other.
        """
        return self._silence(now) or (self._overdue() or self._standstill(now) if all_ranks else None)

    def _silence(self, now: float) -> Trouble | None:
        limit_s = self._limits.silence_s
        longest_s = max((now - heard for heard in self._heard.values()), default=0.0)
        if longest_s <= limit_s:
            return None
        together_s = max(limit_s - TOGETHER_S, limit_s / 2)
        silent = [rank for rank, heard in self._heard.items() if now - heard > together_s]
        silent.sort(key=lambda rank: (self._heard[rank], rank))
        have, whose, does = (
            ("has", "its process is stopped or its host does", "rank")
            if len(silent) == 1
            else ("have", "their processes are stopped or their hosts do", "ranks")
        )
        return Trouble(
            sentence=f"{does} {numbers(silent)} {have} not been heard of for {longest_s:.0f} s{self._at(silent)}: "
            f"{whose} not answer",
            silent=tuple(silent),
        )

    def _overdue(self) -> Trouble | None:
        overdue_s = max((beat.overdue_s for beat in self._beats.values()), default=0.0)
        if not overdue_s:
            return None
        return Trouble(sentence=f"a collective has waited for {overdue_s:.0f} s (--distributed-timeout-minutes)")

    def _standstill(self, now: float) -> Trouble | None:
        still_s = now - max(self._moved.values())
        kinds: Collection[PhaseKind] = {beat.kind for beat in self._beats.values()} or {"start"}
        # Ranks wait for one that is in another phase: the most patient of them decides.
        if still_s <= max(self._limits.phases[kind] for kind in kinds):
            return None
        if len(self._moved) == 1:
            return Trouble(sentence=f"rank 0 has got nothing done for {still_s:.0f} s{self._at([0])}")
        return Trouble(sentence=f"no rank has got anything done for {still_s:.0f} s")

    def _at(self, ranks: Sequence[int]) -> str:
        phases = sorted({beat.phase for rank in ranks if (beat := self._beats.get(rank))})
        return f" ({', '.join(phases)})" if phases else ""


def numbers(ranks: Sequence[int], *, most: int = 8) -> str:
    """Ranks in words, in their order: "1, 2, 3", the first few of many."""
    listed = ", ".join(str(rank) for rank in ranks[:most])
    return listed if len(ranks) <= most else f"{listed} and {len(ranks) - most} more"
