"""Which state a run goes on from, once every byte of it has been looked at."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import ProcessGroup

from tests.checkpoint.states import write
from tests.checkpoint.test_writer import save, state_writer
from tests.ranks import on_ranks, world_of_one
from tests.small_runs import run_flags, write_rows
from tests.tiny_models import make_checkpoint
from xrl.checkpoint.changes import flat_settings
from xrl.checkpoint.choose import SavedState
from xrl.checkpoint.manifest import Unusable
from xrl.config import RunConfig
from xrl.config.parse import parse_settings
from xrl.config.paths import absolute_paths
from xrl.launch.exit import RunEnded
from xrl.models.shape import read_model_shape
from xrl.parallel.control import Control
from xrl.parallel.layout import Layout
from xrl.run_state import RunState, choose_state, put_later_states_aside


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[ProcessGroup]:
    with world_of_one() as found:
        yield found


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Of a run of two ranks that has saved three states."""

    def play(rank: int, group: ProcessGroup) -> None:
        writer = state_writer(tmp_path / "state", rank, group, keep=3)
        for step in (1, 2, 3):
            save(writer, rank, step)

    on_ranks(2, play)
    return tmp_path


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)


def chosen(run: RunConfig, num_ranks: int = 3) -> list[Any]:
    """What each rank goes on from, or how it ends."""

    def play(rank: int, group: ProcessGroup) -> Any:
        try:
            state = choose_state(run, Control(group, leads=rank == 0))
        except (Unusable, RunEnded) as error:
            return error
        return state and state.manifest.step

    return on_ranks(num_ranks, play)


def test_every_rank_goes_on_from_the_newest(run_dir: Path) -> None:
    assert chosen(RunConfig(run_dir=run_dir)) == [3, 3, 3]
    assert chosen(RunConfig(run_dir=run_dir / "other"), num_ranks=2) == [None, None]


@pytest.mark.parametrize("file", ["t0-p0-d0.safetensors", "t1-p0-d0.safetensors"])
def test_a_flipped_bit_costs_the_newest_state_and_is_said_aloud(
    file: str, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flip_a_bit(run_dir / "state" / "step-3" / file)
    assert chosen(RunConfig(run_dir=run_dir)) == [2, 2, 2]
    assert f"{file}, written by rank {file[1]}, has checksum" in caplog.text
    assert "it is not used, and is step-3.damaged from now on" in caplog.text
    assert sorted(path.name for path in (run_dir / "state").iterdir()) == ["step-1", "step-2", "step-3.damaged"]


def test_two_damaged_states_in_a_row_cost_two(run_dir: Path) -> None:
    (run_dir / "state" / "step-3" / "manifest.json").unlink()
    flip_a_bit(run_dir / "state" / "step-2" / "t1-p0-d0.safetensors")
    assert chosen(RunConfig(run_dir=run_dir)) == [1, 1, 1]


def test_a_named_state_that_is_damaged_is_refused_and_stays_as_it_is(run_dir: Path) -> None:
    folder = run_dir / "state" / "step-3"
    flip_a_bit(folder / "t1-p0-d0.safetensors")
    lead, *others = chosen(RunConfig(run_dir=run_dir, resume=str(folder)))
    assert isinstance(lead, Unusable)
    assert "written by rank 1, has checksum" in str(lead)
    assert all(isinstance(other, RunEnded) and not other.sentence for other in others)
    assert folder.is_dir()


def test_where_no_state_is_whole_none_is_put_aside_and_the_run_is_refused(run_dir: Path) -> None:
    for step in (1, 2, 3):
        flip_a_bit(run_dir / "state" / f"step-{step}" / "t0-p0-d0.safetensors")
    (lead,) = chosen(RunConfig(run_dir=run_dir), num_ranks=1)
    assert isinstance(lead, Unusable)
    assert "step-3/t0-p0-d0.safetensors, written by rank 0, has checksum" in str(lead)
    assert "has no other whole state" in str(lead)
    assert sorted(path.name for path in (run_dir / "state").iterdir()) == ["step-1", "step-2", "step-3"]


def test_states_of_a_future_that_is_not_this_run_s_are_put_aside(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put_later_states_aside(run_dir / "state", 1)
    assert sorted(path.name for path in (run_dir / "state").iterdir()) == [
        "step-1",
        "step-2.superseded",
        "step-3.superseded",
    ]
    assert "is newer than the state that the run goes on from" in caplog.text


class Actor:
    """What is trained, without a model."""

    num_updates = 2
    cut = SimpleNamespace(layout=Layout(tensor_size=1, pipeline_size=1))

    def load(self, saved: SavedState) -> None:
        self.loaded = saved.folder


class Counter:
    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def test_parts_get_their_states_and_what_has_changed_is_told(
    tmp_path: Path, world: ProcessGroup, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    data = write_rows(tmp_path / "train.jsonl", [{"prompt": "1+1=?", "ground_truth": "2"}] * 4)
    flags = run_flags(make_checkpoint(tmp_path / "model"), data, tmp_path)
    before = flat_settings(absolute_paths(parse_settings(flags)))
    folder = write(tmp_path / "state", 3, settings=before, identity={}, parts={"counter": {"count": 7}})
    settings, counter, actor = parse_settings([*flags, "--lr", "1e-3"]), Counter(), Actor()
    state = RunState(
        settings,
        read_model_shape(settings.model.model),
        actor,  # type: ignore[arg-type]
        Control(world, leads=True),
        everywhere={},
        on_lead={"counter": counter},
        keeps_reference=False,
    )
    state.load(SavedState.at(folder))
    assert actor.loaded == folder
    assert counter.count == 7
    assert "continues, not bitwise, because --lr is 0.001, was 1e-06" in caplog.text
    assert "continues, not bitwise, because layout: TP1 x PP1 x DP1, was TP2 x PP1 x DP1" in caplog.text


def test_a_reference_that_is_another_model_is_refused(tmp_path: Path, world: ProcessGroup) -> None:
    data = write_rows(tmp_path / "train.jsonl", [{"prompt": "1+1=?", "ground_truth": "2"}] * 4)
    flags = run_flags(make_checkpoint(tmp_path / "model"), data, tmp_path)
    settings = parse_settings([*flags, "--run-dir", str(tmp_path / "run"), "--kl-coef", "0.1"])

    def state() -> RunState:
        return RunState(
            settings,
            read_model_shape(settings.model.model),
            Actor(),  # type: ignore[arg-type]
            Control(world, leads=True),
            everywhere={},
            on_lead={},
            keeps_reference=True,
        )

    said = state()._identity
    assert "reference" in said
    folder = write(tmp_path / "run" / "state", 3, identity=said)
    state().load(SavedState.at(folder))
    shutil.rmtree(tmp_path / "model")
    make_checkpoint(tmp_path / "model", seed=1)
    with pytest.raises(Unusable, match="--model has other content than the run that saved it had"):
        state().load(SavedState.at(folder))
