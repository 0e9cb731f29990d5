"""Ranks that are missed: by the clock alone, and with the store and the threads."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch.distributed as dist

from xrl.launch.progress import Progress
from xrl.launch.watch import Beat, Silence, Watch

LIMITS = {"silence_limit_s": 60.0, "lead_limit_s": 600.0}


def beat(number: int, phase: str = "update 3", pieces: int = 0) -> Beat:
    return Beat(number=number, phase=phase, pieces=pieces)


def test_ranks_that_beat_are_not_missed() -> None:
    silence = Silence([1, 2], now=0.0, **LIMITS)
    for number, now in enumerate(range(0, 1000, 50)):
        silence.hear(1, beat(number), now=now)
        silence.hear(2, beat(number), now=now)
        assert silence.missed(now=now + 49) is None


def test_a_rank_whose_beat_does_not_change_is_missed_and_what_it_was_at_is_said() -> None:
    silence = Silence([1, 2], now=0.0, **LIMITS)
    silence.hear(1, beat(0), now=1.0)
    silence.hear(2, beat(0), now=1.0)
    silence.hear(2, beat(1), now=50.0)
    silence.hear(1, beat(0), now=50.0)  # the same again
    assert silence.missed(now=61.0) is None
    assert "rank 1 has not been heard of for 61 s (update 3)" in str(silence.missed(now=62.0))


def test_a_rank_that_never_beat_is_missed() -> None:
    assert "rank 1 has not been heard of" in str(Silence([1], now=0.0, **LIMITS).missed(now=61.0))


def test_rank_0_may_be_long_over_one_thing_but_not_for_ever() -> None:
    silence = Silence([0], now=0.0, **LIMITS)
    for now in range(0, 600, 10):
        silence.hear(0, beat(now, phase="rollout 2"), now=now)
        assert silence.missed(now=now) is None
    silence.hear(0, beat(601, phase="rollout 2"), now=601.0)
    assert silence.missed(now=601.0) == "rank 0 has got nothing done for 601 s (rollout 2)"


@pytest.mark.parametrize("change", [{"phase": "rollout 3"}, {"pieces": 1}])
def test_a_piece_or_a_phase_further_is_something_done(change: dict[str, object]) -> None:
    silence = Silence([0], now=0.0, **LIMITS)
    silence.hear(0, beat(0, phase="rollout 2"), now=500.0)
    silence.hear(0, Beat(**{"number": 1, "phase": "rollout 2", "pieces": 0} | change), now=599.0)  # type: ignore[arg-type]
    assert silence.missed(now=601.0 + 50.0) is None


def test_another_rank_than_0_waits_for_others_and_is_not_asked_what_it_does() -> None:
    silence = Silence([1], now=0.0, **LIMITS)
    for now in range(0, 2000, 10):
        silence.hear(1, beat(now), now=now)
    assert silence.missed(now=2000.0) is None


def test_who_could_not_listen_itself_misses_nobody() -> None:
    silence = Silence([0, 1], now=0.0, **LIMITS)
    silence.begin_again(now=5000.0)
    assert silence.missed(now=5059.0) is None
    assert silence.missed(now=5061.0) is not None


def test_a_beat_survives_the_store() -> None:
    said = beat(7, phase='saving "hf-3"', pieces=12)
    assert Beat.from_json(said.to_json().encode()) == said


@pytest.fixture
def store() -> Iterator[dist.TCPStore]:
    yield dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))


def client(store: dist.TCPStore) -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", store.port, is_master=False, timeout=timedelta(seconds=5))


def test_a_rank_that_stops_beating_is_named_to_rank_0(store: dist.TCPStore) -> None:
    said: queue.Queue[str] = queue.Queue()
    limits = {"world_size": 2, "lead_limit_s": 600.0, "beat_interval_s": 0.02, "silence_limit_s": 1.0}
    lead = Watch(lambda: client(store), Progress(), rank=0, end=said.put, **limits)  # type: ignore[arg-type]
    other = Watch(lambda: client(store), Progress(phase="update 1"), rank=1, end=said.put, **limits)  # type: ignore[arg-type]
    with pytest.raises(queue.Empty):
        said.get(timeout=1.5)
    other.close()
    assert said.get(timeout=30).startswith("rank 1 has not been heard of for 1 s (update 1)")
    lead.close()


def test_a_store_that_does_not_answer_is_silence(store: dist.TCPStore) -> None:
    def refuse() -> dist.TCPStore:
        raise RuntimeError("no such host")

    said: queue.Queue[str] = queue.Queue()
    watch = Watch(
        refuse,
        Progress(),
        rank=1,
        world_size=2,
        lead_limit_s=600.0,
        end=said.put,
        beat_interval_s=0.02,
        silence_limit_s=0.2,
    )
    assert said.get(timeout=30).startswith("rank 0 has not been heard of")
    watch.close()


def test_progress_counts_items_as_the_next_one_is_asked_for() -> None:
    progress = Progress()
    seen = [(item, progress.pieces) for item in progress.through("abc")]
    assert seen == [("a", 0), ("b", 1), ("c", 2)]
    assert progress.pieces == 3
