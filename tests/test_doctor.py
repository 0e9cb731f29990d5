"""`xrl doctor`: runs that go on, runs that have ended, and folders that are none."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from tests.test_watching import HANG
from xrl import doctor
from xrl.config import SettingsError
from xrl.files.notes import Notes
from xrl.launch.limits import MORE_S, Limits
from xrl.launch.progress import Progress
from xrl.launch.watch import Self, Store, Watch
from xrl.metrics.run_folder import RunFolder
from xrl.parallel.store import connect_to_store
from xrl.watching import write_down

LIMITS = Limits(silence_s=60.0, phases=dict.fromkeys(MORE_S, 600.0))


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path)
    folder.logs.mkdir()
    folder.config.touch()
    return folder


@pytest.fixture
def store() -> Iterator[dist.TCPStore]:
    yield dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))


def note_ranks(folder: RunFolder, **changes: Any) -> None:
    """As rank 0 of a run in this process would."""
    process = psutil.Process()
    fields = {
        "world_size": 1,
        "store": None,
        "attempt": 0,
        "host": socket.gethostname(),
        "pid": process.pid,
        "started": process.create_time(),
    }
    folder.ranks.write_text(json.dumps(fields | changes))


def watch(store: Store, rank: int, world_size: int) -> Watch:
    return Watch(
        lambda: store,
        Self(rank=rank, progress=Progress(phase="rollout 3"), host="node1"),
        world_size=world_size,
        limits=LIMITS,
        tell=lambda hang: None,
        end=lambda hang: None,
        beat_interval_s=0.02,
    )


def test_one_rank_alone_is_asked_by_notes_in_its_folder(folder: RunFolder) -> None:
    note_ranks(folder)
    rank = watch(Notes(folder.doctor), 0, 1)
    for _ in range(2):
        sentence, line = doctor.examine(folder.path)
        assert sentence == "1 of 1 ranks have answered within 0 s"
        assert line.startswith(f"rank 0 on node1 (pid {os.getpid()}): rollout 3 for 0 s; at ")
    rank.close()


def test_ranks_that_go_on_are_asked_through_their_store(
    folder: RunFolder, store: dist.TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "ANSWER_LIMIT_S", 1.0)
    note_ranks(folder, world_size=3, store=["127.0.0.1", store.port])
    ranks = [watch(client(store), rank, 3) for rank in (0, 1)]  # the third is stopped
    sentence, *lines = doctor.examine(folder.path)
    for rank in ranks:
        rank.close()
    assert sentence == "2 of 3 ranks have answered within 1 s; those that have not come first"
    assert lines[0] == "rank 2; not heard of for 1 s"
    assert [line[:7] for line in lines[1:]] == ["rank 0 ", "rank 1 "]


def client(store: dist.TCPStore) -> Store:
    return connect_to_store({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)})


def test_of_a_run_that_hung_the_report_is_shown(folder: RunFolder) -> None:
    note_ranks(folder, pid=2**22 + 7)
    write_down(folder, HANG)
    sentence, line = doctor.examine(folder.path)
    assert sentence.startswith("the run has ended at 20") and sentence.endswith(f": {HANG.sentence}")
    assert [line] == HANG.lines()


def test_a_process_that_has_the_number_of_rank_0_is_not_taken_for_it(folder: RunFolder) -> None:
    note_ranks(folder, started=psutil.Process().create_time() - 3600.0)
    assert doctor.examine(folder.path) == ["the run has ended, and did not end because it hung"]


def test_a_folder_that_is_no_run_s_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"RUN_DIR .* is no run's folder: it has no config.yaml"):
        doctor.examine(tmp_path)
    with pytest.raises(SettingsError, match=r"RUN_DIR .* is no run's folder: it has no config.yaml"):
        doctor.examine(tmp_path / "gone")


def test_a_run_whose_ranks_have_not_met_is_refused(folder: RunFolder) -> None:
    with pytest.raises(SettingsError, match="has no logs/ranks.json: the ranks of this run have not met yet"):
        doctor.examine(folder.path)


@pytest.mark.parametrize("fields", [{"store": []}, {"store": 7}, {"world_size": "many"}, {"pid": None}])
def test_whereabouts_that_are_none_are_refused(folder: RunFolder, fields: dict[str, Any]) -> None:
    note_ranks(folder, **fields)
    with pytest.raises(SettingsError, match="does not say where the ranks of a run are"):
        doctor.examine(folder.path)


def test_a_report_that_is_none_is_refused(folder: RunFolder) -> None:
    note_ranks(folder, pid=2**22 + 7)
    folder.hang.write_text("{}")
    with pytest.raises(SettingsError, match=r"hang\.json: no report of a hang"):
        doctor.examine(folder.path)


def test_a_store_that_is_not_there_is_named(folder: RunFolder) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    note_ranks(folder, store=["127.0.0.1", port])
    with pytest.raises(SettingsError, match=rf"store of the run's ranks at 127\.0\.0\.1:{port} does not answer: Conn"):
        doctor.examine(folder.path)
