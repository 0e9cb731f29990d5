"""A run that is asked to stop ends where nothing is lost, on every rank."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
from torch.distributed import ProcessGroup

from tests.ranks import on_ranks, world_of_one
from xrl.parallel.cpu import prepare_megatron_for_cpu

prepare_megatron_for_cpu()

from tests.trainer_parts import Run, published  # noqa: E402
from xrl.launch.exit import RunStopped  # noqa: E402
from xrl.launch.stop import EXIT_STOPPED  # noqa: E402
from xrl.parallel.control import Control  # noqa: E402
from xrl.stopping import Stopping  # noqa: E402

MakeRun = Callable[..., Run]
STEP = ["take {0}", "write answers {0}", "learn from 4", "judge mismatch 0.125 of {0}"]


@pytest.fixture(autouse=True, scope="module")
def world() -> Iterator[ProcessGroup]:
    with world_of_one() as found:
        yield found


@pytest.fixture
def make_run(tmp_path: Path, world: ProcessGroup) -> MakeRun:
    return lambda **options: Run(tmp_path, control=world, **options)


def step(index: int) -> list[str]:
    return [*(line.format(index) for line in STEP), *published(index), f"report {index}"]


def stopped(run: Run, num_rollouts: int = 9) -> str:
    """The sentence with which the run stops."""
    with pytest.raises(RunStopped) as caught:
        run.train(num_rollouts)
    assert caught.value.code == EXIT_STOPPED
    return caught.value.sentence


def ask_at(run: Run, line: str) -> None:
    """Ask the run to stop when its log says so."""

    class Log(list[str]):
        def append(self, said: str) -> None:
            super().append(said)
            if said == line:
                run.stop.ask("SIGUSR1", signal.SIGUSR1)

    log = Log()
    for part in (run, run.actor, run.collector, run.fleet, run.stream, run.canary, run.journal, run.checkpoints):
        part.log = log
    run.saves.log = log


def test_asked_during_an_update_it_ends_the_step_first(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    ask_at(run, "learn from 4")
    assert stopped(run) == f"stopped by SIGUSR1 after rollout 1 of 9; state saved in {tmp_path / 'state' / 'step-1'}"
    assert run.log == [*published(0), *step(1), "save the state after 1", "finish"]


def test_asked_during_a_rollout_it_throws_the_rollout_away(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    ask_at(run, "take 2")
    assert stopped(run) == f"stopped by SIGUSR1 after rollout 1 of 9; state saved in {tmp_path / 'state' / 'step-1'}"
    assert run.log == [
        *(*published(0), *step(1)),
        *("take 2", "prompts from 7", "save the state after 1", "finish"),
    ]


def test_before_the_first_rollout_is_learned_from_there_is_nothing_to_save(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    ask_at(run, "publish 0")
    assert stopped(run) == f"stopped by SIGUSR1 before the first rollout was learned from; run folder {tmp_path}"
    assert run.log == [*published(0), "finish"]


@pytest.mark.parametrize(
    ("first_step", "left"), [(0, "; the state was not saved"), (1, "")], ids=["a new run", "one that goes on"]
)
def test_without_a_save_only_what_this_attempt_has_learned_is_lost(
    make_run: MakeRun, tmp_path: Path, first_step: int, left: str
) -> None:
    run = make_run()
    ask_at(run, "learn from 4")
    trainer, journal = run.trainer(9), cast(Any, run.journal)
    stopping = Stopping(run.stop, journal, Control.of(run.groups), first_step=first_step)
    trainer.hooks, trainer.stopping = (*trainer.hooks[:-1], stopping), stopping
    with pytest.raises(RunStopped) as caught:
        trainer.train()
    assert caught.value.sentence == f"stopped by SIGUSR1 after rollout 1 of 9; run folder {tmp_path}{left}"
    assert caught.value.loses_nothing == (not left)


def test_after_the_last_rollout_there_is_nothing_to_stop(make_run: MakeRun) -> None:
    run = make_run()
    ask_at(run, "learn from 4")
    run.train(1)
    assert run.log[-1] == "finish" and "save the state after 1" not in run.log


def test_requests_wait_for_a_boundary_from_the_first_one_on(make_run: MakeRun) -> None:
    run = make_run()
    assert not run.stop.has_begun
    run.train(1)
    assert run.stop.has_begun


@dataclass(frozen=True)
class Ended:
    run: Run
    sentence: str


def train_on_ranks(folder: Path, ask: Callable[[int, Run], None]) -> tuple[Ended, Ended]:
    """Two ranks of a run, each of which stops.

    Args:
        ask: asks ranks to stop, each before it begins.
    """

    def play(rank: int, control: ProcessGroup) -> Ended:
        run = Run(folder, control=control, rank=rank, num_ranks=2)
        ask(rank, run)
        with pytest.raises(RunStopped) as caught:
            run.trainer(9, leads=rank == 0).train()
        return Ended(run, caught.value.sentence)

    lead, other = on_ranks(2, play)
    return lead, other


def test_a_request_to_any_rank_ends_all_and_rank_0_says_why(tmp_path: Path) -> None:
    def ask(rank: int, run: Run) -> None:
        if rank == 1:
            ask_at(run, "learn")

    lead, other = train_on_ranks(tmp_path, ask)
    saved = tmp_path / "state" / "step-1"
    assert lead.sentence == f"stopped by a signal to another rank after rollout 1 of 9; state saved in {saved}"
    assert other.sentence == ""
    assert "save the state after 1" in lead.run.log and "save the state after 1" in other.run.log


def test_a_rollout_that_is_cut_off_ends_every_rank_before_the_update(tmp_path: Path) -> None:
    def ask(rank: int, run: Run) -> None:
        if rank == 0:
            ask_at(run, "take 2")

    lead, other = train_on_ranks(tmp_path, ask)
    assert lead.sentence.startswith("stopped by SIGUSR1 after rollout 1 of 9; ")
    assert other.run.log.count("learn") == 1 and other.run.log[-1] == "save the state after 1"
