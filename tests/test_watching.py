"""What a run writes down of its ranks, and how it ends when it hangs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from xrl.launch.beats import Beat, Trouble
from xrl.launch.hang import Hang, RankReport
from xrl.metrics.run_folder import RunFolder
from xrl.watching import _kill_sibling, write_down, write_whereabouts

ROOT = Path(__file__).resolve().parents[1]
HANG = Hang.of(
    Trouble(sentence="rank 0 has got nothing done for 601 s (rollout 2)"),
    [
        RankReport(
            rank=0,
            beat=Beat(number=0, host="node1", pid=7, phase="rollout 2", kind="rollout", phase_s=700.0, pieces=3),
            own_frame="xrl/rollout/dispatch.py:130 _next",
        )
    ],
)
TELLS = """
import sys, time
from pathlib import Path
from tests.test_watching import HANG
from xrl.metrics.ending import Ending
from xrl.metrics.run_folder import RunFolder
import xrl.watching

if "no disk" in sys.argv:
    xrl.watching.DISK_LIMIT_S, xrl.watching.END_LIMIT_S = 0.1, 1.0
    xrl.watching.write_down = lambda folder, hang: time.sleep(600)
ending = Ending()
ending.begin(RunFolder(Path(sys.argv[1])))
xrl.watching.tell_hung(HANG, ending)
time.sleep(600 if "stuck" in sys.argv else 0)
"""


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    (tmp_path / "logs").mkdir()
    return RunFolder(tmp_path)


def tell(folder: RunFolder, *how: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", TELLS, str(folder.path), *how]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


def test_whereabouts_name_the_store_and_rank_0(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    write_whereabouts(folder, world_size=4)
    found = json.loads(folder.ranks.read_text())
    assert (found["world_size"], found["store"]) == (4, ["127.0.0.1", 29500])
    assert found["pid"] > 0 and found["host"] and found["started"] > 0


def test_a_report_of_an_earlier_attempt_is_removed(folder: RunFolder) -> None:
    write_down(folder, HANG)
    write_whereabouts(folder, world_size=1)
    assert not folder.hang.exists()


def test_a_rank_alone_has_no_store(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    write_whereabouts(folder, world_size=1)
    assert json.loads(folder.ranks.read_text())["store"] is None


def test_a_full_disk_is_no_reason_to_end(tmp_path: Path) -> None:
    write_whereabouts(RunFolder(tmp_path / "gone"), world_size=1)
    write_down(RunFolder(tmp_path / "gone"), HANG)
    assert list(tmp_path.iterdir()) == []


def test_a_hang_that_is_written_down_is_read_again(folder: RunFolder) -> None:
    write_down(folder, HANG)
    assert Hang.from_fields(json.loads(folder.hang.read_text())) == HANG


def test_a_process_that_is_no_rank_beside_this_one_is_not_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as child:
        _kill_sibling(child.pid)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.2)
        child.kill()


@pytest.mark.slow
def test_a_hang_is_told_with_the_report_and_what_is_left_of_the_run(folder: RunFolder) -> None:
    first, second, third = tell(folder).stderr.splitlines()
    assert first == "xrl: error: rank 0 has got nothing done for 601 s (rollout 2)"
    assert second == "  rank 0 on node1 (pid 7): rollout 2 for 700 s; at xrl/rollout/dispatch.py:130 _next"
    assert third.startswith("xrl: ended before the first rollout was learned from; run folder ")
    assert folder.hang.is_file()


@pytest.mark.slow
def test_a_disk_that_hangs_keeps_nobody_from_telling_and_no_process_alive(folder: RunFolder) -> None:
    found = tell(folder, "no disk", "stuck")
    assert found.returncode == 75
    assert len(found.stderr.splitlines()) == 2 and not folder.hang.exists()
