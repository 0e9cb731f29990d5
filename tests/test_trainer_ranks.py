"""What a rank plays that does not lead: threads of this process play two ranks over gloo."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import ProcessGroup

from tests.ranks import on_ranks, world_of_one
from xrl.parallel.cpu import prepare_megatron_for_cpu

prepare_megatron_for_cpu()

from tests.trainer_parts import Run, flat, not_written  # noqa: E402
from xrl.launch.exit import RunEnded  # noqa: E402
from xrl.rollout.process import WorkerGone  # noqa: E402

# How long one side dawdles where the other must wait for it. Too short a time hides a mistake, and makes none.
TOO_EARLY_S = 0.05


@pytest.fixture(autouse=True, scope="module")
def world() -> Iterator[ProcessGroup]:
    with world_of_one() as found:
        yield found


@dataclass(frozen=True)
class Ended:
    """One rank's part of a run, and the error that it ended with."""

    run: Run
    error: BaseException | None


def train(
    folder: Path, *, num_rollouts: int = 1, prepare: Callable[[Run], None] = lambda run: None, **sections: Any
) -> tuple[Ended, Ended]:
    """A run of two ranks.

    Args:
        prepare: changes the lead's parts before it begins.
    """

    def play(rank: int, control: ProcessGroup) -> Ended:
        run = Run(folder, control=control, rank=rank, num_ranks=2, **sections)
        if rank == 0:
            prepare(run)
        trainer = run.trainer(num_rollouts, leads=rank == 0)
        try:
            trainer.train()
        except (Exception, RunEnded) as error:
            return Ended(run, error)
        return Ended(run, None)

    lead, other = on_ranks(2, play)
    return lead, other


def test_every_rank_learns_from_the_lead_s_samples_and_gives_its_part_of_the_weights(tmp_path: Path) -> None:
    lead, other = train(tmp_path, num_rollouts=2)
    assert (lead.error, other.error) == (None, None)
    assert other.run.log == [
        "weights 0 are out",
        *("learn", "weights 1 are out"),
        *("learn", "weights 2 are out"),
        "weights 2 are out",  # into hf-final
    ]
    for mine, theirs in zip(lead.run.actor.updates, other.run.actor.updates, strict=True):
        assert len(mine[0]) == 4 and theirs[0] == [] and mine[1].settings == theirs[1].settings
    assert list(lead.run.journal.rows) == [1, 2]


def test_weights_are_given_once_more_in_the_middle_of_a_rollout(tmp_path: Path) -> None:
    def prepare(run: Run) -> None:
        def lose_all() -> None:
            assert run.pool.recover is not None
            for _ in range(2):
                run.pool.recover()

        run.collector.meanwhile = lose_all

    lead, other = train(tmp_path, prepare=prepare)
    assert (lead.error, other.error) == (None, None)
    assert lead.run.log.count("publish 0") == 3
    assert other.run.log == ["weights 0 are out"] * 3 + ["learn"] + ["weights 1 are out"] * 2


def test_weights_that_reached_nobody_are_given_again_by_every_rank(tmp_path: Path) -> None:
    def prepare(run: Run) -> None:
        run.publisher.is_lost = lambda number: number == 1
        run.pool.num_ready = lambda: int(run.publisher.num_calls > 1)

    lead, other = train(tmp_path, prepare=prepare)
    assert (lead.error, other.error) == (None, None)
    assert other.run.log[:3] == ["weights 0 are out"] * 2 + ["learn"]


def test_where_no_worker_is_left_every_rank_ends_and_the_lead_says_why(tmp_path: Path) -> None:
    def prepare(run: Run) -> None:
        run.pool.num_ready = lambda: 0

    lead, other = train(tmp_path, prepare=prepare, rollout={"rollout_max_restarts": 1})
    assert isinstance(lead.error, WorkerGone)
    assert isinstance(other.error, RunEnded) and other.error.sentence == ""
    assert other.run.log == ["weights 0 are out"] * 2


def test_every_rank_scores_the_canary(tmp_path: Path) -> None:
    lead, other = train(tmp_path, rollout={"canary_tokens": 4})
    assert lead.run.actor.scored == [lead.run.canary.samples] * 2
    assert other.run.log.count("score canaries") == 2


def test_a_checkpoint_is_written_of_every_rank_s_weights_wherever_one_is_due(tmp_path: Path) -> None:
    def prepare(run: Run) -> None:
        run.checkpoints.due = {1}

    lead, other = train(tmp_path, num_rollouts=2, prepare=prepare)
    assert [line for line in lead.run.log if line.startswith("save")] == ["save hf-1", "save hf-final"]
    assert other.run.log == [
        *("weights 0 are out", "learn", "weights 1 are out"),
        *("weights 2 are out", "learn", "weights 2 are out", "weights 2 are out"),
    ]


def test_every_rank_waits_for_the_room_for_the_last_checkpoint(tmp_path: Path) -> None:
    def prepare(run: Run) -> None:
        run.checkpoints.faults, run.checkpoints.waits = [not_written(), not_written()], [True, False]

    lead, other = train(tmp_path, prepare=prepare)
    assert isinstance(lead.error, RunEnded) and "No space left" in lead.error.sentence
    assert isinstance(other.error, RunEnded) and other.error.sentence == ""
    assert other.run.log[-2:] == ["weights 1 are out"] * 2 and lead.run.log.count("save hf-final") == 2


def test_a_run_that_learns_nothing_ends_on_every_rank(tmp_path: Path) -> None:
    def prepare(run: Run) -> None:
        run.collector.groups = flat

    lead, other = train(tmp_path, num_rollouts=12, prepare=prepare)
    assert isinstance(lead.error, RunEnded) and lead.error.sentence != ""
    assert isinstance(other.error, RunEnded) and other.error.sentence == ""
    assert other.run.log.count("learn") == 10


@pytest.mark.parametrize("num_rollouts", [2, 3])
def test_a_short_run_that_learned_nothing_fails_on_every_rank_or_on_none(tmp_path: Path, num_rollouts: int) -> None:
    def prepare(run: Run) -> None:
        run.collector.groups = flat

    lead, other = train(tmp_path, num_rollouts=num_rollouts, prepare=prepare)
    expected = RunEnded if num_rollouts == 3 else type(None)
    assert isinstance(lead.error, expected) and isinstance(other.error, expected)


def test_nobody_takes_a_device_before_the_other_side_has_left_it(tmp_path: Path) -> None:
    """One log of both ranks, in the order in which things happened; each side gives the other time to go too early."""
    together: list[str] = []
    actor_took, engines_slept = threading.Event(), threading.Event()

    def play(rank: int, control: ProcessGroup) -> None:
        run = Run(tmp_path, control=control, rank=rank, num_ranks=2, rollout={"colocate": True})

        def leave() -> None:
            if rank == 1:
                engines_slept.wait(TOO_EARLY_S)
            together.append("actor leaves")

        def take() -> None:
            together.append("actor takes")
            actor_took.set()

        def sleep() -> None:
            actor_took.wait(TOO_EARLY_S)
            together.append("engines sleep")
            engines_slept.set()

        run.actor.memory.offload, run.actor.memory.restore = leave, take
        run.pool.sleep = sleep  # type: ignore[method-assign]
        run.pool.wake = lambda: together.append("engines wake")  # type: ignore[method-assign]
        run.trainer(leads=rank == 0).train()

    on_ranks(2, play)
    turn = ["actor leaves", "actor leaves", "engines sleep", "engines wake"]
    assert together[:4] == turn
    # A rank that has taken its device learns and leaves it again without waiting for the others.
    assert together[4] == "engines sleep" and together[5] == "actor takes"
    assert sorted(together[5:9]) == ["actor leaves"] * 2 + ["actor takes"] * 2
    assert together[9:] == turn[2:]
