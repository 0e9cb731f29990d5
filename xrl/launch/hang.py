"""The report of a hang: what each rank is at, those at fault first. Arithmetic and words, no clocks and no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from xrl.launch.beats import Beat, Trouble, numbers

# One line a rank that matters: in a hang of hundreds, the first few say it all.
MOST_LINES = 8
MOST_GROUP_CHARS = 48
# torch does not record gloo's messages between two ranks: a rank whose main thread is in one of these files waits for
# another one all the same.
MESSAGE_FILES = (
    "torch/distributed/",
    "megatron/core/pipeline_parallel/p2p_communication.py",
    "xrl/actor/broadcast.py",
    "xrl/weights/export.py",
    "xrl/weights/shared_export.py",
)


@dataclass(frozen=True, kw_only=True)
class Pending:
    """A collective, or a message between two ranks, that has begun on this rank and not ended."""

    name: str  # "gloo:broadcast"
    number: int  # of the group's collectives, from 1; equal on all its ranks where all are in the same one
    group: str  # its name, and its purpose where it has one
    is_message: bool = False  # between two ranks: its number is theirs
    ranks: str  # of the group: "[0, 1, 2, 3]"
    shapes: tuple[tuple[int, ...], ...]  # of what this rank brings
    dtypes: tuple[str, ...]
    waited_s: float
    timeout_s: float  # after which torch ends it, naming nobody

    def __str__(self) -> str:
        tensors = ", ".join(
            f"{list(shape)} {dtype}" for shape, dtype in zip(self.shapes, self.dtypes, strict=False)
        )  # of a barrier: none
        ranks = self.ranks if len(self.ranks) <= MOST_GROUP_CHARS else f"{self.ranks.count(',') + 1} ranks"
        return (
            f"{self.name} #{self.number} of group {self.group}{f' {ranks}' if ranks else ''}"
            f"{f' on {tensors}' if tensors else ''} for {self.waited_s:.0f} s"
        )


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What is known of one rank: by its own word, or, where it is silent, by its last beat."""

    rank: int
    beat: Beat | None  # the last one; None: it never beat
    silent_s: float | None = None  # not heard of for so long; None: it has answered
    own_frame: str = ""  # where its main thread is, in our code or the user's: "xrl/trainer.py:110 step"
    frame: str = ""  # and innermost
    waits_for: str = ""  # outside of its process
    pending: tuple[Pending, ...] = ()  # the oldest first

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> RankReport:
        """The opposite.

        Raises:
            ValueError: it is none.
        """
        return cls.from_fields(json.loads(text))

    @classmethod
    def from_fields(cls, fields: Any) -> RankReport:
        """The opposite of `dataclasses.asdict`.

        Raises:
            ValueError: it is none.
        """
        try:
            beat, silent_s = fields["beat"], fields["silent_s"]
            return cls(
                rank=int(fields["rank"]),
                beat=None if beat is None else Beat.from_fields(beat),
                silent_s=None if silent_s is None else float(silent_s),
                own_frame=str(fields["own_frame"]),
                frame=str(fields["frame"]),
                waits_for=str(fields["waits_for"]),
                pending=tuple(_pending(each) for each in fields["pending"]),
            )
        except (TypeError, KeyError) as error:
            raise ValueError(f"no report of a rank: {error}") from error

    @property
    def waits(self) -> bool:
        """Whether it waits for other ranks, in a collective or for a message."""
        return bool(self.pending) or self.frame.startswith(MESSAGE_FILES)

    def line(self, *, others_wait: bool) -> str:
        """What people read of it.

        Args:
            others_wait: whether any rank waits for others: then it is news that this one does not.
        """
        said = [f"rank {self.rank}"]
        if self.beat is not None:
            phase_s = self.beat.phase_s + (self.silent_s or 0.0)
            said = [
                f"rank {self.rank} on {self.beat.host} (pid {self.beat.pid}): {self.beat.phase} for {phase_s:.0f} s"
            ]
        if self.silent_s is not None:
            said.append(f"not heard of for {self.silent_s:.0f} s")
        if self.own_frame or self.frame:
            inner = f" ({self.frame})" if self.frame and self.frame != self.own_frame else ""
            said.append(f"at {self.own_frame or 'no line of ours'}{inner}")
        if self.waits_for:
            said.append(f"waits for {self.waits_for}")
        if self.pending:
            said.append(f"in {self.pending[0]}")
        elif self.waits:
            said.append("in a message to or from another rank")
        elif others_wait and self.silent_s is None:
            said.append("in no collective")
        return "; ".join(said)


@dataclass(frozen=True, kw_only=True)
class Hang:
    """What is known of all ranks of a run that hangs, or of one that somebody asks about."""

    sentence: str  # what is wrong; empty: nobody has seen anything wrong
    ranks: tuple[RankReport, ...]  # those at fault first

    @classmethod
    def of(cls, trouble: Trouble | None, reports: Sequence[RankReport]) -> Hang:
        """The report, of the ranks' own ones in any order.

        Args:
            trouble: what was seen; None: the reports were asked for.
        """
        ranks = tuple(at_fault_first(reports))
        if trouble is None:
            return cls(sentence="", ranks=ranks)
        blame = "" if trouble.silent or len(ranks) == 1 else _blame(ranks)
        return cls(sentence=trouble.sentence + (f"; {blame}" if blame else ""), ranks=ranks)

    def lines(self, *, most: int = MOST_LINES) -> list[str]:
        """One a rank that matters."""
        others_wait = any(report.waits for report in self.ranks)
        shown = [report.line(others_wait=others_wait) for report in self.ranks[:most]]
        left = self.ranks[most:]
        more = f"and {len(left)} more: ranks {numbers(sorted(report.rank for report in left))}"
        return [*shown, more] if left else shown

    def text(self) -> str:
        """The sentence, and the lines below it, indented."""
        return "\n  ".join([self.sentence, *self.lines()])

    def to_json(self) -> str:
        """All of it, for a file."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Hang:
        """The opposite of `dataclasses.asdict`.

        Raises:
            ValueError: it is none.
        """
        try:
            ranks = tuple(RankReport.from_fields(each) for each in fields["ranks"])
            return cls(sentence=str(fields["sentence"]), ranks=ranks)
        except (TypeError, KeyError) as error:
            raise ValueError(f"no report of a hang: {error}") from error


def at_fault_first(reports: Sequence[RankReport]) -> list[RankReport]:
    """The silent ranks, the longest first; then those that are in no collective; then those that are behind.

    A rank is behind where others of a group are in a later collective of it. Where none is, the lowest number is first.
    """
    latest: dict[str, int] = {}
    for pending in (pending for report in reports for pending in report.pending if not pending.is_message):
        latest[pending.group] = max(pending.number, latest.get(pending.group, 0))

    def order(report: RankReport) -> tuple[float, ...]:
        if report.silent_s is not None:
            return 0, -report.silent_s, report.rank
        if not report.waits:
            return 1, report.rank
        collectives = [pending for pending in report.pending if not pending.is_message]
        behind = max((latest[pending.group] - pending.number for pending in collectives), default=0)
        return 2, -behind, min((pending.number for pending in collectives), default=math.inf), report.rank

    return sorted(reports, key=order)


def _blame(ranks: Sequence[RankReport]) -> str:
    """Who holds up the others, of those at fault first; empty where that cannot be told."""
    if not any(report.waits for report in ranks):
        return ""
    outside = sorted(report.rank for report in ranks if report.silent_s is None and not report.waits)
    if not outside:
        earliest = f", rank {ranks[0].rank} in the earliest" if ranks[0].pending else ""
        return f"all wait for each other{earliest}"
    return f"{_subject(outside, 'is', 'are')} in no collective, and the others wait for {_it(outside)}"


def _subject(ranks: Sequence[int], one: str, several: str) -> str:
    return f"rank {ranks[0]} {one}" if len(ranks) == 1 else f"ranks {numbers(ranks)} {several}"


def _it(ranks: Sequence[int]) -> str:
    return "it" if len(ranks) == 1 else "them"


def _pending(fields: Mapping[str, Any]) -> Pending:
    return Pending(
        name=str(fields["name"]),
        number=int(fields["number"]),
        group=str(fields["group"]),
        is_message=bool(fields["is_message"]),
        ranks=str(fields["ranks"]),
        shapes=tuple(tuple(int(size) for size in shape) for shape in fields["shapes"]),
        dtypes=tuple(str(dtype) for dtype in fields["dtypes"]),
        waited_s=float(fields["waited_s"]),
        timeout_s=float(fields["timeout_s"]),
    )
