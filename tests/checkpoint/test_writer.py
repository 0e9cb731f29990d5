"""States are written while the run goes on, and appear whole or not at all."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed import ProcessGroup

from tests.checkpoint.states import manifest
from tests.ranks import on_ranks, world_of_one
from xrl.checkpoint import writer as writer_module
from xrl.checkpoint.choose import SavedState
from xrl.checkpoint.files import checksums
from xrl.checkpoint.writer import LeadPart, Saved, StateWriter
from xrl.files.disk import NotWritten
from xrl.parallel.control import Control


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[ProcessGroup]:
    with world_of_one() as found:
        yield found


def lead_part(step: int, **arrays: Tensor) -> LeadPart:
    return LeadPart(manifest=manifest(step), arrays=arrays)


def state_writer(folder: Path, rank: int, group: ProcessGroup, *, keep: int = 2, reserve_bytes: int = 0) -> StateWriter:
    control = Control(group, leads=rank == 0)
    return StateWriter(folder, control, file_name=f"t{rank}-p0-d0.safetensors", keep=keep, reserve_bytes=reserve_bytes)


def save(writer: StateWriter, rank: int, step: int, **arrays: Tensor) -> Saved | NotWritten | None:
    pieces = {f"weight/main/{rank}": torch.full((4,), float(10 * step + rank))}
    fault = writer.begin(step, pieces, lead_part(step, **arrays) if rank == 0 else None)
    return writer.settle(wait=True) or fault


def test_every_rank_s_pieces_and_the_lead_s_arrays_are_in_a_state_that_is_whole(tmp_path: Path) -> None:
    def play(rank: int, group: ProcessGroup) -> Any:
        return save(state_writer(tmp_path / "state", rank, group), rank, 3, carried=torch.arange(5))

    result, none = on_ranks(2, play)
    assert none is None
    assert isinstance(result, Saved)
    assert result.folder == tmp_path / "state" / "step-3"
    state = SavedState.at(result.folder)
    assert {name: record.rank for name, record in state.manifest.files.items()} == {
        "t0-p0-d0.safetensors": 0,
        "t1-p0-d0.safetensors": 1,
        "lead.safetensors": 0,
    }
    assert result.num_bytes == sum(record.num_bytes for record in state.manifest.files.values())
    assert load_file(result.folder / "t1-p0-d0.safetensors")["weight/main/1"].tolist() == [31.0] * 4
    assert load_file(result.folder / "lead.safetensors")["carried"].tolist() == [0, 1, 2, 3, 4]
    assert {path.name for path in result.folder.iterdir()} == {*state.manifest.files, "manifest.json"}

    def check(rank: int, group: ProcessGroup) -> list[str]:
        return checksums([result.folder / name for name in state.manifest.files], Control(group, leads=rank == 0))

    assert on_ranks(3, check) == [[record.checksum for record in state.manifest.files.values()]] * 3


def test_what_is_changed_after_the_snapshot_is_not_in_the_state(
    tmp_path: Path, world: ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, write = threading.Event(), writer_module._write

    def late(*arguments: Any) -> None:
        gate.wait(60)
        write(*arguments)

    monkeypatch.setattr(writer_module, "_write", late)
    writer = state_writer(tmp_path, 0, world)
    weight = torch.ones(4)
    assert writer.begin(1, {"w/main/0": weight}, lead_part(1)) is None
    assert writer.is_writing
    assert writer.settle() is None, "the run goes on meanwhile"
    weight.fill_(2)
    gate.set()
    saved = writer.settle(wait=True)
    assert isinstance(saved, Saved)
    assert load_file(saved.folder / "t0-p0-d0.safetensors")["w/main/0"].tolist() == [1.0] * 4
    assert not writer.is_writing


def test_only_the_newest_states_stay(tmp_path: Path, world: ProcessGroup) -> None:
    writer = state_writer(tmp_path, 0, world, keep=2)
    (tmp_path / "step-1.damaged").mkdir()
    for step in (1, 2, 3, 4):
        assert isinstance(save(writer, 0, step), Saved)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1.damaged", "step-3", "step-4"]


def test_a_rank_that_cannot_write_costs_all_of_them_this_save_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = writer_module._write

    def fails_on_rank_1(path: Path, tensors: Any, result: dict[str, Any]) -> None:
        if path.name.startswith("t1") and "step-2" in str(path):
            result.update(errno=28, error="No space left on device")
        else:
            write(path, tensors, result)

    monkeypatch.setattr(writer_module, "_write", fails_on_rank_1)

    def play(rank: int, group: ProcessGroup) -> list[Any]:
        writer = state_writer(tmp_path, rank, group)
        return [save(writer, rank, step) for step in (1, 2, 3)]

    (first, second, third), _ = on_ranks(2, play)
    assert isinstance(first, Saved)
    assert isinstance(third, Saved)
    assert isinstance(second, NotWritten)
    assert "step-2 cannot be written: No space left on device" in str(second)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-3"]


def test_room_is_asked_for_before_anything_is_written(
    tmp_path: Path, world: ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "free_bytes", lambda path: 200_000)
    fault = save(state_writer(tmp_path / "state", 0, world, reserve_bytes=199_000), 0, 1)
    assert isinstance(fault, NotWritten)
    assert "with room left for hf-final" in str(fault)
    assert not (tmp_path / "state").exists()
    assert isinstance(save(state_writer(tmp_path / "state", 0, world), 0, 1), Saved)


def test_behind_the_last_state_no_room_need_be_left(
    tmp_path: Path, world: ProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer_module, "free_bytes", lambda path: 200_000)
    writer = state_writer(tmp_path, 0, world, reserve_bytes=199_000)
    assert writer.begin(1, {"w/main/0": torch.ones(4)}, lead_part(1), is_last=True) is None
    assert isinstance(writer.settle(wait=True), Saved)


def test_a_folder_that_is_there_already_is_not_touched(tmp_path: Path, world: ProcessGroup) -> None:
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-1" / "somebody's").write_text("file")
    fault = save(state_writer(tmp_path, 0, world), 0, 1)
    assert isinstance(fault, NotWritten)
    assert (tmp_path / "step-1" / "somebody's").read_text() == "file"


def test_a_manifest_is_strict_json(tmp_path: Path, world: ProcessGroup) -> None:
    saved = save(state_writer(tmp_path, 0, world), 0, 1)
    assert isinstance(saved, Saved)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads((saved.folder / "manifest.json").read_text(), parse_constant=refuse)["step"] == 1
