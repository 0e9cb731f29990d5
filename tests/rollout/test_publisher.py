"""Publishers: what each adds to the one it wraps, and what is known of an update behind them all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import ProcessGroup

from tests.ranks import on_ranks, world_of_one
from tests.samples import sample
from xrl.launch.exit import RunEnded, RunFailed
from xrl.parallel.control import Control
from xrl.rollout.process import WorkerGone
from xrl.rollout.publish import NoneUpdated, PublishReport
from xrl.rollout.publisher import CheckedPublisher, PersistentPublisher, Published, WeightPublisher
from xrl.types import Sample

PARTS = ["embeddings", "layers.0", "final"]


@pytest.fixture(autouse=True, scope="module")
def world() -> Iterator[ProcessGroup]:
    with world_of_one() as found:
        yield found


class Source:
    """Weights of which nothing is left in the end."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, int]] = []
        self.left: list[str] = []

    def stream(self, memory: Any, *, version: int) -> Iterator[Any]:
        self.calls.append((memory, version))
        self.left = list(PARTS)
        while self.left:
            yield self.left.pop(0)


class Stream:
    """Takes weights to the workers, or none to nobody."""

    memory: Any = "memory"

    def __init__(self, *, is_lost: bool = False) -> None:
        self.is_lost = is_lost

    def publish(self, buckets: Iterator[Any], *, version: int) -> PublishReport:
        if self.is_lost:
            next(buckets)
            raise NoneUpdated("no rollout worker has it")
        assert list(buckets) == PARTS
        return PublishReport(
            seconds=1.0,
            num_bytes=3_000_000_000,
            num_tensors=9,
            num_workers=2,
            num_parts=3,
            num_resent=1,
            checksums=(f"of {version}",),
        )


class Scripted:
    """A publisher whose results a test writes; the last one is repeated."""

    def __init__(self, *checksums: tuple[str, ...] | None) -> None:
        self.checksums = list(checksums)
        self.versions: list[int] = []

    def publish(self, *, version: int) -> Published:
        self.versions.append(version)
        found = self.checksums.pop(0) if len(self.checksums) > 1 else self.checksums[0]
        return Published(metrics={"seconds/publish": 1.0}, checksums=found)


def workers(*num_ready: int) -> Any:
    left = list(num_ready)
    return SimpleNamespace(
        ready=lambda: [0] * left.pop(0), none_left=lambda: WorkerGone("none is left"), num_lost=3, num_restarted=2
    )


def test_an_update_is_reported_by_rank_0_and_every_rank_gives_its_part() -> None:
    source = Source()
    found = WeightPublisher(source, Stream()).publish(version=4)
    assert found.checksums == ("of 4",)
    assert found.metrics.pop("seconds/publish") > 0  # type: ignore[attr-defined]
    assert found.metrics == {"sync/gigabytes": 3.0, "sync/layers": 3.0, "sync/resent": 1.0, "workers/updated": 2.0}
    other = Source()
    WeightPublisher(other, None).publish(version=4)
    assert (source.calls, other.calls, other.left) == ([("memory", 4)], [(None, 4)], [])


def test_weights_that_reach_nobody_are_still_run_to_their_end(caplog: pytest.LogCaptureFixture) -> None:
    source = Source()
    found = WeightPublisher(source, Stream(is_lost=True)).publish(version=1)
    assert (found.checksums, source.left) == (None, [])
    assert "no rollout worker has it" in caplog.text


@pytest.mark.parametrize("differences", [[0.25, 0.75], []])
def test_the_canary_s_samples_are_scored_and_judged_where_a_worker_gave_some(differences: list[float]) -> None:
    given = [sample([1], [3])]
    scored: list[Any] = []

    class Actor:
        def mismatch(self, samples: Sequence[Sample] | None) -> list[float]:
            scored.append(samples)
            return differences

    canary = SimpleNamespace(sample=lambda: given, judge=max)
    found = CheckedPublisher(Scripted(("a",)), Actor(), canary).publish(version=1)
    assert scored == [given]
    assert found.metrics.get("canary") == (0.75 if differences else None)
    CheckedPublisher(Scripted(None), Actor(), None).publish(version=1)
    assert scored[1] is None  # other ranks take part


def test_a_canary_that_fails_ends_the_update() -> None:
    def judge(_: Sequence[float]) -> float:
        raise RunFailed("the engine computes another model")

    actor = SimpleNamespace(mismatch=lambda samples: [9.0])
    canary = SimpleNamespace(sample=list, judge=judge)
    with pytest.raises(RunFailed, match="another model"):
        CheckedPublisher(Scripted(("a",)), actor, canary).publish(version=1)


def test_an_update_that_all_workers_were_lost_over_is_repeated(world: ProcessGroup) -> None:
    inner = Scripted(None, None, ("a",))
    found = PersistentPublisher(inner, workers(0, 0, 1), Control(world, leads=True), max_repeats=2).publish(version=5)
    assert inner.versions == [5, 5, 5]
    assert found.metrics == {"seconds/publish": 3.0, "workers/lost": 3.0, "workers/restarted": 2.0}


def test_where_no_worker_is_left_rank_0_says_so_and_the_others_end() -> None:
    def play(rank: int, group: ProcessGroup) -> BaseException | None:
        control = Control(group, leads=rank == 0)
        publisher = PersistentPublisher(Scripted(None), workers(0, 0) if rank == 0 else None, control, max_repeats=1)
        try:
            publisher.publish(version=1)
        except (WorkerGone, RunEnded) as error:
            return error
        return None

    lead, other = on_ranks(2, play)
    assert isinstance(lead, WorkerGone) and isinstance(other, RunEnded)


def test_weights_have_changed_where_their_bits_differ_from_the_last_that_a_worker_took(world: ProcessGroup) -> None:
    inner = Scripted(("a",), ("a",), None, ("b",))
    publisher = PersistentPublisher(inner, workers(1, 1, 1, 1), Control(world, leads=True), max_repeats=0)
    assert [publisher.publish(version=n).changed for n in range(4)] == [True, False, False, True]
