"""Ranks that watch each other, with the store and the threads."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import torch.distributed as dist

from xrl.launch.beats import Beat
from xrl.launch.hang import Hang, Pending, RankReport
from xrl.launch.limits import MORE_S, Limits
from xrl.launch.progress import Progress
from xrl.launch.watch import ASKED_KEY, END_KEY, Self, Watch, beat_key, report_key

# Real time passes in these tests: what must not happen by then, and what must happen long before.
SOON_S, LIMIT_S = 0.3, 30.0
WAITING = Pending(
    name="gloo:broadcast", number=5, group="0", ranks="[0, 1]", shapes=(), dtypes=(), waited_s=1.0, timeout_s=600.0
)
# (rank, what it tells; None: that it ends)
Ends = queue.Queue[tuple[int, Hang | None]]
Start = Callable[..., Watch]


@pytest.fixture
def store() -> Iterator[dist.TCPStore]:
    yield dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))


def client(store: dist.TCPStore) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", store.port, is_master=False, timeout=timedelta(seconds=5))


@pytest.fixture
def ends() -> Ends:
    return queue.Queue()


@pytest.fixture
def start(store: dist.TCPStore, ends: Ends) -> Iterator[Start]:
    watches: list[Watch] = []

    def start(rank: int, *, silence_s: float = 60.0, phase_s: float = 60.0, **options: object) -> Watch:
        of_self = {name: options.pop(name) for name in ("pending",) if name in options}
        me = Self(rank=rank, progress=Progress(phase=f"update {rank}"), host=f"node{rank}", **of_self)  # type: ignore[arg-type]
        arguments: dict[str, object] = {
            "connect": lambda: client(store),
            "world_size": 2,
            "limits": Limits(silence_s=silence_s, phases=dict.fromkeys(MORE_S, phase_s)),
            "tell": lambda hang: ends.put((rank, hang)),
            "end": lambda hang: ends.put((rank, None)),
            "beat_interval_s": 0.02,
            **options,
        }
        watches.append(Watch(arguments.pop("connect"), me, **arguments))  # type: ignore[arg-type]
        return watches[-1]

    yield start
    for watch in watches:
        watch.close()


def reported(ends: Ends, rank: int = 0) -> Hang:
    """What this rank tells, whatever the others do before."""
    while True:
        who, hang = ends.get(timeout=LIMIT_S)
        if who == rank:
            assert hang is not None
            return hang


def test_ranks_that_beat_do_not_end(start: Start, ends: Ends) -> None:
    start(0, silence_s=5.0)
    start(1, silence_s=5.0)
    with pytest.raises(queue.Empty):
        ends.get(timeout=SOON_S)


def test_a_rank_that_stops_beating_is_named_to_rank_0_with_its_last_beat(
    start: Start, store: dist.TCPStore, ends: Ends
) -> None:
    start(0, silence_s=1.0)
    other = start(1)
    wait_until(lambda: store.check([beat_key(1)]))
    time.sleep(SOON_S)
    other.close()
    hang = reported(ends)
    assert hang.sentence.startswith("rank 1 has not been heard of for 1 s (update 1)")
    silent, own = hang.ranks
    assert silent.rank == 1 and silent.beat is not None and silent.beat.host == "node1" and silent.silent_s is not None
    assert own.rank == 0 and own.frame


def test_a_standstill_is_told_with_what_every_rank_says_of_itself(start: Start, ends: Ends) -> None:
    start(1, pending=lambda: [WAITING])
    start(0, phase_s=0.5)
    hang = reported(ends)
    assert hang.sentence.endswith("rank 0 is in no collective, and the others wait for it")
    assert [report.rank for report in hang.ranks] == [0, 1]
    assert hang.ranks[1].pending == (WAITING,) and hang.ranks[1].silent_s is None and hang.ranks[1].frame


def test_the_others_end_without_a_word_when_rank_0_has_told_of_the_hang(start: Start, ends: Ends) -> None:
    start(1)
    start(0, phase_s=0.5)
    rank, hang = ends.get(timeout=LIMIT_S)
    assert rank == 0 and hang is not None
    ended: set[tuple[int, Hang | None]] = set()
    while len(ended) < 2:
        ended.add(ends.get(timeout=LIMIT_S))  # rank 1, which a real end would end, says so again and again
    assert ended == {(0, None), (1, None)}


def test_a_rank_that_hears_nothing_of_rank_0_says_so_itself(start: Start, ends: Ends) -> None:
    start(1, silence_s=0.5)
    hang = reported(ends, rank=1)
    assert hang.sentence.startswith("rank 0 has not been heard of")
    assert [report.rank for report in hang.ranks] == [0, 1]


def test_a_store_that_does_not_answer_is_silence(start: Start, ends: Ends) -> None:
    def refuse() -> dist.TCPStore:
        raise RuntimeError("no such host")

    start(1, connect=refuse, silence_s=0.2)
    assert reported(ends, rank=1).sentence.startswith("rank 0 has not been heard of")


def test_a_client_of_the_store_that_never_returns_keeps_nobody(start: Start, ends: Ends) -> None:
    returns = threading.Event()

    def hang() -> dist.TCPStore:
        returns.wait(LIMIT_S)
        raise RuntimeError("the link is cut")

    start(1, connect=hang, silence_s=0.2)
    try:
        assert reported(ends, rank=1).sentence.startswith("rank 0 has not been heard of")
    finally:
        returns.set()


def test_one_rank_alone_needs_no_store_to_be_missed(start: Start, ends: Ends) -> None:
    def refuse() -> dist.TCPStore:
        raise RuntimeError("there is none")

    start(0, world_size=1, connect=refuse, phase_s=0.2)
    hang = reported(ends)
    assert hang.sentence.startswith("rank 0 has got nothing done for 0 s (update 0)")
    assert [report.rank for report in hang.ranks] == [0]


def test_whoever_asks_gets_a_report_each_time(start: Start, store: dist.TCPStore) -> None:
    start(1, pending=lambda: [WAITING])
    for number in (1, 2):
        assert store.add(ASKED_KEY, 1) == number
        report = RankReport.from_json(store.get(report_key(number, 1)))
        assert (report.rank, report.pending) == (1, (WAITING,))


def test_a_run_that_has_ended_is_not_asked_to_go_on(start: Start, store: dist.TCPStore, ends: Ends) -> None:
    store.set(END_KEY, "rank 0 has got nothing done")
    start(1)
    assert ends.get(timeout=LIMIT_S) == (1, None)


def test_a_watch_that_is_closed_ends_nobody(start: Start, ends: Ends) -> None:
    start(0, silence_s=0.2).close()
    with pytest.raises(queue.Empty):
        ends.get(timeout=2 * SOON_S)


def test_a_beat_says_what_the_process_is_at() -> None:
    progress = Progress()
    progress.enter("saving hf-3", "save")
    beat = Self(rank=2, progress=progress).beat(7, overdue_s=3.0)
    assert (beat.number, beat.phase, beat.kind, beat.pieces, beat.overdue_s) == (7, "saving hf-3", "save", 1, 3.0)
    assert Beat.from_json(beat.to_json()) == beat


def test_a_report_says_for_whom_the_process_waits_as_of_now() -> None:
    progress, left = Progress(), ["8 verdicts"]
    me = Self(rank=0, progress=progress)
    with progress.waiting(lambda: left[0]):
        assert me.report().waits_for == "8 verdicts"
        left[0] = "1 verdicts"
        assert me.report().waits_for == "1 verdicts"
    assert me.report().waits_for == ""


def test_what_cannot_be_said_while_it_changes_is_left_out() -> None:
    def changing() -> str:
        raise RuntimeError("dictionary changed size during iteration")

    progress = Progress()
    with progress.waiting(changing):
        assert Self(rank=0, progress=progress).report().waits_for == ""


def test_progress_counts_items_as_the_next_one_is_asked_for() -> None:
    progress = Progress()
    seen = [(item, progress.pieces) for item in progress.through("abc")]
    assert seen == [("a", 0), ("b", 1), ("c", 2)]
    assert progress.pieces == 3


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
