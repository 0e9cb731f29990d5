"""How a run ends: with its last weights saved, or with the sentence that says why it learned nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed import ProcessGroup

from tests.ranks import world_of_one
from tests.samples import group
from xrl.parallel.cpu import prepare_megatron_for_cpu

prepare_megatron_for_cpu()

from tests.trainer_parts import Run, flat, not_written, report, saved  # noqa: E402
from xrl.launch.exit import RunEnded  # noqa: E402

MakeRun = Callable[..., Run]


@pytest.fixture(scope="module")
def world() -> Iterator[ProcessGroup]:
    with world_of_one() as found:
        yield found


@pytest.fixture
def make_run(tmp_path: Path, world: ProcessGroup) -> MakeRun:
    return lambda **options: Run(tmp_path, control=world, **options)


def test_a_checkpoint_that_cannot_be_written_is_told_of_and_the_run_goes_on(make_run: MakeRun) -> None:
    run = make_run()
    run.checkpoints.due = {1}
    fault = not_written()
    run.checkpoints.faults = [fault]
    run.train(2)
    assert run.checkpoints.warnings == [fault]
    assert run.journal.said == [f"saved {run.journal.folder.path / 'hf-final'}"]
    assert run.log[-1] == "finish"


def test_the_last_weights_are_saved_as_soon_as_there_is_room(make_run: MakeRun) -> None:
    run = make_run()
    run.checkpoints.faults, run.checkpoints.waits = [not_written(), not_written()], [True, True]
    run.train()
    once = saved("hf-final", num_rollouts=1)
    assert run.log[-9:] == [*once, "wait for room", *once, "wait for room", *once, "finish"]


def test_a_run_whose_last_weights_cannot_be_saved_says_so_at_its_end(make_run: MakeRun) -> None:
    run = make_run()
    run.checkpoints.faults, run.checkpoints.waits = [not_written()], [False]
    with pytest.raises(RunEnded) as caught:
        run.train()
    assert caught.value.sentence.startswith("hf-1 cannot be written: No space left on device")
    assert caught.value.says_where
    assert run.log[-1] == "wait for room"


def test_a_run_that_learns_nothing_ends_after_ten_rollouts(make_run: MakeRun) -> None:
    run = make_run()
    run.collector.groups = flat
    run.checkpoints.due = set(range(1, 13))
    with pytest.raises(RunEnded) as caught:
        run.train(12)
    assert list(run.journal.rows) == list(range(1, 11))
    assert len(run.journal.warned) == 1  # after three
    assert run.log[-2:] == ["report 10", "finish"]
    assert caught.value.sentence.endswith(
        f"; run folder {run.journal.folder.path}, without a checkpoint, as the weights are still those of the start "
        f"(--on-nothing-learned warn: go on all the same)"
    )
    assert caught.value.says_where


def test_a_run_that_has_learned_before_saves_what_it_came_to(make_run: MakeRun) -> None:
    run = make_run()
    run.collector.groups = lambda number: [group(1.0, 0.0), group(0.0, 1.0)] if number == 1 else flat(number)
    with pytest.raises(RunEnded):
        run.train(12)
    assert run.log[-4:] == ["report 11", *saved("hf-11", num_rollouts=12), "finish"]


def test_a_run_that_may_learn_nothing_goes_on_to_its_end(make_run: MakeRun) -> None:
    run = make_run(stops=False)
    run.collector.groups = flat
    run.train(12)
    assert len(run.journal.rows) == 12 and run.log[-1] == "finish"
    assert len(run.journal.warned) == 3  # after 3 and 10 rollouts, and at the end


@pytest.mark.parametrize(("num_rollouts", "fails"), [(2, False), (3, True)])
def test_a_run_of_three_rollouts_that_taught_nothing_has_failed(
    make_run: MakeRun, num_rollouts: int, fails: bool
) -> None:
    run = make_run()
    run.collector.groups = flat
    if fails:
        with pytest.raises(RunEnded) as caught:
            run.train(num_rollouts)
        assert caught.value.says_where
    else:
        run.train(num_rollouts)
    assert run.log[-3:] == [*saved("hf-final", num_rollouts=num_rollouts), "finish"]
    assert len(run.journal.warned) == 1


@pytest.mark.parametrize(
    ("changes", "update", "dtype", "takes_norm", "learns"),
    [
        (True, {}, torch.float32, True, True),
        (False, {}, torch.float32, True, False),  # the same bits as before
        (False, {}, torch.bfloat16, True, True),  # its main weights may have changed
        (True, {"grad_norm": 0.0}, torch.float32, True, False),
        (True, {"grad_norm": 0.0}, torch.float32, False, True),  # no norm is taken
        (True, {"lr": 0.0}, torch.float32, True, False),
    ],
)
def test_whether_a_run_learned_is_told_by_its_updates_and_the_bits_of_its_weights(
    make_run: MakeRun, changes: bool, update: dict[str, float], dtype: torch.dtype, takes_norm: bool, learns: bool
) -> None:
    run = make_run(takes_norm=takes_norm)
    run.stream.checksums = lambda version: (f"checksum {version if changes else 0}",)
    run.actor.reports, run.actor.dtype = lambda _: [report(**update)], dtype
    if learns:
        run.train(3)
    else:
        with pytest.raises(RunEnded):
            run.train(3)
    assert bool(run.journal.warned) is not learns
