"""When a run's state is saved, and what is said of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from tests.checkpoint.states import manifest
from tests.ranks import world_of_one
from xrl.checkpoint import writer as writer_module
from xrl.checkpoint.manifest import Manifest, saved_steps
from xrl.checkpoint.writer import LeadPart, StateWriter
from xrl.launch.exit import RunEnded
from xrl.launch.progress import Progress
from xrl.parallel.control import Control
from xrl.state_saving import StateKeeper, StateSaving


class Model:
    """A weight that counts the steps."""

    def __init__(self) -> None:
        self.weight = torch.zeros(1)

    def pieces(self) -> Mapping[str, Tensor]:
        return {"w/main/0": self.weight}


class Journal:
    def __init__(self) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []
        self.say = self.said.append
        self.warn = self.warned.append


class Saving(StateSaving):
    """On rank 0, into a folder."""

    def __init__(self, folder: Path, group: ProcessGroup, *, interval: int | None, keep: int = 99) -> None:
        self.folder, self.model, self.journal = folder, Model(), Journal()
        control = Control(group, leads=True)
        writer = StateWriter(folder, control, file_name="t0-p0-d0.safetensors", keep=keep)
        keeper: Any = StateKeeper(
            journal=self.journal,  # type: ignore[arg-type]
            lead_part=lambda step: LeadPart(manifest=manifest(step), arrays={}),
        )
        super().__init__(self.model, writer, keeper, control, Progress(), interval=interval)

    def run(self, num_steps: int) -> None:
        trainer: Any = SimpleNamespace(num_steps=num_steps)
        for step in range(num_steps + 1):
            self.model.weight.fill_(step)
            self(trainer, step)


@pytest.fixture(scope="module")
def world() -> Iterator[ProcessGroup]:
    with world_of_one() as found:
        yield found


@pytest.mark.parametrize(
    ("interval", "num_steps", "expected"), [(None, 3, []), (1, 3, [3, 2, 1]), (2, 5, [5, 4, 2]), (9, 4, [4])]
)
def test_a_state_is_saved_every_so_many_steps_and_at_the_end(
    interval: int | None, num_steps: int, expected: list[int], tmp_path: Path, world: ProcessGroup
) -> None:
    saving = Saving(tmp_path, world, interval=interval)
    saving.run(num_steps)
    assert saved_steps(tmp_path) == expected
    assert [f"step-{step}:" in line for step, line in zip(sorted(expected), saving.journal.said, strict=True)] == [
        True
    ] * len(expected)
    assert all(Manifest.read(tmp_path / f"step-{step}").step == step for step in expected)


def test_a_save_that_fails_is_warned_of_once_and_the_run_goes_on(
    tmp_path: Path, world: ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = Saving(tmp_path, world, interval=1)
    free = iter([10**9, 0, 0, 10**9])
    monkeypatch.setattr(writer_module, "free_bytes", lambda path: next(free))
    saving.run(4)
    assert saved_steps(tmp_path) == [4, 1]
    (warning,) = saving.journal.warned
    assert "step-2 cannot be written" in warning
    assert "tries again with the next state that is due" in warning


def test_a_state_can_be_asked_for_at_once(tmp_path: Path, world: ProcessGroup) -> None:
    saving = Saving(tmp_path, world, interval=None)
    saving.save_now(7)
    assert saved_steps(tmp_path) == [7]


def test_a_state_that_is_there_is_not_saved_twice(tmp_path: Path, world: ProcessGroup) -> None:
    saving = Saving(tmp_path, world, interval=1)
    trainer: Any = SimpleNamespace(num_steps=9)
    saving(trainer, 1)
    saving.save_now(1)
    assert saved_steps(tmp_path) == [1]


def test_a_state_that_was_asked_for_and_cannot_be_saved_ends_the_run(
    tmp_path: Path, world: ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "free_bytes", lambda path: 0)
    with pytest.raises(RunEnded) as ended:
        Saving(tmp_path, world, interval=None).save_now(7)
    assert "the run's state cannot be saved: " in ended.value.sentence
    assert "step-7 cannot be written" in ended.value.sentence
