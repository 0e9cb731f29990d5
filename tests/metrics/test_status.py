"""How a run is, for scripts."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from xrl.config import SettingsError
from xrl.launch.exit import RunEnded, RunFailed, RunStopped
from xrl.launch.signals import Stopped
from xrl.launch.stop import early_end
from xrl.metrics.ending import Ending, note_end_of_ranks
from xrl.metrics.run_folder import RunFolder
from xrl.metrics.status import State, Status, status_at_end


@pytest.mark.parametrize(
    ("error", "state", "sentence"),
    [
        (None, "done", ""),
        (
            RunStopped("stopped by SIGUSR1 after rollout 3 of 9; ..."),
            "saved",
            "stopped by SIGUSR1 after rollout 3 of 9; ...",
        ),
        (RunStopped("the state was not saved", loses_nothing=False), "failed", "the state was not saved"),
        (early_end(signal.SIGTERM), "saved", "stopped by SIGTERM after rollout 3 of 9"),
        (Stopped(signal.SIGTERM), "failed", "stopped by SIGTERM after rollout 3 of 9"),
        (SettingsError("--lr must be >= 0, got -1"), "bad-settings", "--lr must be >= 0, got -1"),
        (RunEnded("nothing more to do"), "failed", "nothing more to do"),
        (RunFailed("no worker is left"), "failed", "no worker is left"),
        (ValueError("two\nlines"), "failed", "ValueError: two"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_way_a_run_ends_is_a_state_and_a_sentence(error: BaseException | None, state: State, sentence: str) -> None:
    words = "after rollout 3 of 9"
    assert status_at_end(error, step=3, words=words) == Status(state=state, step=3, sentence=sentence)


def test_a_run_is_running_until_it_ends_and_what_it_says_first_holds(tmp_path: Path) -> None:
    folder, ending = RunFolder(tmp_path), Ending()
    ending.end(None)  # without a folder there is nowhere to say it
    ending.begin(folder)
    assert json.loads(folder.status.read_text()) == {"state": "running", "step": 0, "sentence": ""}
    ending.learned(4)
    ending.words_about(RunStopped("stopped"))
    ending.end(None)
    assert Status.read(folder.status) == Status(state="saved", step=4, sentence="stopped")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"state": "gone", "step": 1, "sentence": ""}', '{"state": "done"}'])
def test_what_no_run_would_write_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / "status.json").write_text(text)
    assert Status.read(tmp_path / "status.json") is None


def test_a_status_that_cannot_be_written_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Ending().begin(RunFolder(tmp_path / "gone"))
    assert "status.json cannot be written" in caplog.text


@pytest.mark.parametrize(
    ("state", "is_news", "is_replaced"),
    [
        ("running", False, True),
        ("running", True, True),
        ("failed", True, True),
        ("failed", False, False),
        ("saved", True, False),
    ],
)
def test_the_command_above_the_ranks_says_what_they_could_not(
    tmp_path: Path, state: State, is_news: bool, is_replaced: bool
) -> None:
    folder, file = RunFolder(tmp_path), tmp_path / "left-to-say"
    Status(state=state, step=0, sentence="stopped by SIGTERM").write(folder.status)
    file.write_text(json.dumps([str(tmp_path), 9, 0]))
    note_end_of_ranks(file, "rank 0 was ended by SIGKILL", is_news)
    found = Status.read(folder.status)
    assert found is not None
    assert (found.state, found.sentence) == (
        ("failed", "rank 0 was ended by SIGKILL") if is_replaced else (state, "stopped by SIGTERM")
    )


def test_where_ranks_left_nothing_to_say_the_command_above_them_writes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "left-to-say"
    file.write_text("")
    note_end_of_ranks(file, "rank 0 was ended by SIGKILL", True)
    assert list(tmp_path.iterdir()) == [file]
