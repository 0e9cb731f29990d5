"""Whether a run is asked to stop, and what a signal means to whom."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from xrl.config import SettingsError
from xrl.launch.signals import Stopped
from xrl.launch.stop import (
    EXIT_STOPPED,
    LOOK_S,
    CauseFile,
    PassedOn,
    RunSignals,
    StopAsked,
    StopRequest,
    TimeLimit,
    job_start,
)

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER, SOMEBODY = 77, 99
PATIENCE_S = 60.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def limit(seconds: float) -> TimeLimit:
    return TimeLimit(flag=f"{seconds:g}s", seconds=seconds, start=1000.0)


def test_nothing_asks_a_run_that_nobody_asks() -> None:
    stop = StopRequest()
    assert stop.asked() is None
    stop.check()


def test_who_asks_first_is_named() -> None:
    stop = StopRequest()
    stop.ask("SIGUSR1", signal.SIGUSR1)
    stop.ask("SIGTERM", signal.SIGTERM)
    assert (stop.asked(), stop.signal) == ("SIGUSR1", signal.SIGUSR1)
    with pytest.raises(StopAsked, match="SIGUSR1"):
        stop.check()


def test_a_file_asks_also_one_that_was_made_while_the_run_began(tmp_path: Path) -> None:
    file = tmp_path / "stop"
    stop = StopRequest()
    stop.watch_file(file)
    assert stop.asked() is None
    file.touch()
    other = StopRequest()
    other.watch_file(file)
    assert other.asked() == f"the file {file}"
    assert stop.asked() == f"the file {file}"
    file.unlink()
    assert stop.asked() == f"the file {file}", "asked is asked"


def test_while_answers_are_waited_for_the_file_is_looked_for_once_a_second(tmp_path: Path) -> None:
    clock, file = Clock(), tmp_path / "stop"
    stop = StopRequest(clock)
    stop.watch_file(file)
    stop.check()
    file.touch()
    clock.now += LOOK_S / 2
    stop.check()
    clock.now += LOOK_S / 2
    with pytest.raises(StopAsked):
        stop.check()


def test_a_run_stops_before_its_time_is_over() -> None:
    clock = Clock()
    stop = StopRequest(clock)
    stop.watch_time(limit(100.0))
    clock.now += 99.0
    assert stop.asked() is None
    clock.now += 1.0
    assert stop.asked() == "--exit-before 100s"


def test_the_longest_update_and_the_longest_save_must_still_fit() -> None:
    clock = Clock()
    stop = StopRequest(clock)
    stop.watch_time(limit(100.0))
    for seconds in (3.0, 20.0, 5.0):
        stop.updated(seconds)
    clock.now += 59.0  # a save that nobody has seen yet is taken for as long as an update
    assert stop.asked() is None
    for seconds in (10.0, 2.0):
        stop.saved(seconds)
    clock.now += 10.0
    assert stop.asked() is None
    clock.now += 1.0
    assert stop.asked() is not None


def test_a_job_begins_when_slurm_says_so() -> None:
    assert job_start({}, 5.0) == 5.0
    assert job_start({"SLURM_JOB_START_TIME": "1700000000"}, 5.0) == 1_700_000_000.0
    with pytest.raises(SettingsError, match="SLURM_JOB_START_TIME must be a time in seconds since 1970, found 'noon'"):
        job_start({"SLURM_JOB_START_TIME": "noon"}, 5.0)


class Rank:
    """One rank's signals."""

    def __init__(self, *, begun: bool = True, launcher: int | None = LAUNCHER, causes: CauseFile | None = None) -> None:
        self.stop, self.ends, self.said = StopRequest(), list[SystemExit](), list[str]()
        if begun:
            self.stop.begin()
        self._signals = RunSignals(self.stop, self.ends.append, launcher=launcher, causes=causes, say=self.said.append)

    def hear(self, *signals: tuple[signal.Signals, int]) -> list[str | int | None]:
        """What has ended the process after these, (name, exit code) of each end."""
        for number, sender in signals:
            self._signals.hear(number, sender)
        found: list[str | int | None] = []
        for end in self.ends:
            assert isinstance(end, Stopped)
            found += [end.signal.name, end.code if isinstance(end.code, int) else None]
        return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_is_a_request(number: signal.Signals) -> None:
    rank = Rank()
    assert rank.hear((number, SOMEBODY)) == []
    assert rank.stop.asked() == number.name


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_one_ends_at_once(number: signal.Signals) -> None:
    assert Rank().hear((number, SOMEBODY), (number, SOMEBODY)) == [number.name, 128 + number]
    assert Rank().hear((signal.SIGTERM, SOMEBODY), (number, SOMEBODY)) == [number.name, 128 + number]


def test_a_request_may_be_repeated() -> None:
    rank = Rank()
    assert rank.hear(*[(signal.SIGUSR1, SOMEBODY)] * 3, (signal.SIGUSR2, SOMEBODY), (signal.SIGTERM, SOMEBODY)) == []


def test_a_terminal_that_goes_ends_at_once() -> None:
    assert Rank().hear((signal.SIGHUP, 0)) == ["SIGHUP", 128 + signal.SIGHUP]


def test_whoever_presses_ctrl_c_is_told_that_it_was_heard() -> None:
    rank = Rank(launcher=None)
    rank.hear((signal.SIGUSR1, SOMEBODY))
    assert rank.said == []
    rank = Rank(launcher=None)
    rank.hear((signal.SIGINT, 0))
    assert rank.said == ["stopping at the end of this step; Ctrl-C again ends at once"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_before_there_is_anything_to_save_a_request_ends_at_once_and_may_be_tried_again(number: signal.Signals) -> None:
    assert Rank(begun=False).hear((number, SOMEBODY)) == [number.name, EXIT_STOPPED]


def test_before_there_is_anything_to_save_ctrl_c_ends_at_once() -> None:
    assert Rank(begun=False).hear((signal.SIGINT, 0)) == ["SIGINT", 128 + signal.SIGINT]


def test_torchrun_asks_as_often_as_it_likes() -> None:
    assert Rank().hear(*[(signal.SIGTERM, LAUNCHER)] * 2, (signal.SIGTERM, SOMEBODY)) == []


def test_below_xrl_train_its_sigterm_says_that_a_rank_has_failed(tmp_path: Path) -> None:
    rank = Rank(causes=CauseFile(tmp_path))
    assert rank.hear((signal.SIGTERM, LAUNCHER)) == ["SIGTERM", 128 + signal.SIGTERM]


def test_below_xrl_train_the_terminal_s_ctrl_c_is_left_to_it(tmp_path: Path) -> None:
    rank = Rank(causes=CauseFile(tmp_path))
    assert rank.hear((signal.SIGINT, 0), (signal.SIGINT, 0)) == []
    assert rank.stop.asked() is None


def test_below_xrl_train_the_first_cause_is_named_not_the_signal_that_passed_it_on(tmp_path: Path) -> None:
    CauseFile(tmp_path).note("SIGINT")
    rank = Rank(causes=CauseFile(tmp_path))
    assert rank.hear((signal.SIGUSR1, LAUNCHER)) == []
    assert rank.stop.asked() == "SIGINT"


def test_a_rank_that_is_asked_tells_xrl_train_which_tells_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda process, number: killed.append((process, number)))
    rank = Rank(causes=CauseFile(tmp_path))
    rank.hear((signal.SIGTERM, SOMEBODY), (signal.SIGUSR1, LAUNCHER))
    assert killed == [(LAUNCHER, signal.SIGUSR1)]
    assert CauseFile(tmp_path).read() == "SIGTERM"


def test_the_end_of_what_is_above_a_rank_ends_it_at_once() -> None:
    assert Rank().hear((signal.SIGTERM, os.getpid())) == ["SIGTERM", 128 + signal.SIGTERM]


def test_a_rank_that_fails_waits_for_no_boundary() -> None:
    rank = Rank()
    rank.stop.fails = True
    assert rank.hear((signal.SIGTERM, LAUNCHER)) == ["SIGTERM", 128 + signal.SIGTERM]


def test_the_first_cause_stays(tmp_path: Path) -> None:
    causes = CauseFile(tmp_path)
    assert causes.read() is None
    causes.note("SIGUSR1")
    causes.note("SIGTERM")
    assert CauseFile(tmp_path).read() == "SIGUSR1"


class Above:
    """The command above the ranks, whose ids are children of nobody."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *ranks: int) -> None:
        self.ranks, self.ends, self.said = list(ranks), list[SystemExit](), list[str]()
        self.killed: list[tuple[int, int]] = []
        self._has_killed = threading.Condition()
        monkeypatch.setattr(os, "kill", self._kill)
        self.signals = PassedOn(self.ends.append, lambda: list(self.ranks), CauseFile(folder), self.said.append)

    def _kill(self, process: int, number: int) -> None:
        with self._has_killed:
            self.killed.append((process, number))
            self._has_killed.notify_all()

    def wait_for(self, number: int) -> None:
        with self._has_killed:
            assert self._has_killed.wait_for(lambda: len(self.killed) >= number, PATIENCE_S)


@pytest.fixture
def make_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Above]:
    return lambda *ranks: Above(tmp_path, monkeypatch, *ranks)


def test_a_request_is_passed_on_to_each_rank_once_also_to_those_that_come_later(
    make_above: Callable[..., Above], tmp_path: Path
) -> None:
    above = make_above(11, 12)
    above.signals.hear(signal.SIGTERM, SOMEBODY)
    above.wait_for(2)
    above.ranks.append(13)
    above.wait_for(3)
    above.signals.hear(signal.SIGUSR1, SOMEBODY)
    above.signals.close()
    assert above.killed == [(11, signal.SIGUSR1), (12, signal.SIGUSR1), (13, signal.SIGUSR1)]
    assert CauseFile(tmp_path).read() == "SIGTERM" and not above.ends


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_second_ctrl_c_or_sigterm_ends_the_ranks_at_once(
    make_above: Callable[..., Above], number: signal.Signals
) -> None:
    above = make_above()
    above.signals.hear(signal.SIGUSR1, SOMEBODY)
    above.signals.hear(number, SOMEBODY)
    assert not above.ends
    above.signals.hear(number, SOMEBODY)
    above.signals.close()
    (end,) = above.ends
    assert isinstance(end, Stopped) and end.code == 128 + number
    assert len(above.said) == (number == signal.SIGINT)


def test_a_terminal_that_goes_ends_the_ranks_at_once(make_above: Callable[..., Above]) -> None:
    above = make_above(11)
    above.signals.hear(signal.SIGHUP, 0)
    assert [end.code for end in above.ends] == [128 + signal.SIGHUP] and above.killed == []


PROGRAM = """
import sys, time
from xrl.launch.exit import announce_errors, run_main
from xrl.launch.hearing import RUN_SIGNALS, hearing
from xrl.launch.stop import RunSignals, StopRequest
from xrl.launch.terminal import say

def main():
    stop.begin()
    print("begun", flush=True)
    while stop.asked() is None:
        time.sleep(0.01)
    print(stop.asked(), flush=True)
    time.sleep(60)

stop = StopRequest()
with hearing(RUN_SIGNALS, lambda heard: RunSignals(stop, heard.end, say=say).hear) as heard:
    run_main(main, heard)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_was_asked_once_is_ended_by_the_second_signal(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "begun\n"
        process.send_signal(number)
        assert process.stdout.readline() == f"{number.name}\n"
        process.send_signal(number)
        assert process.wait(PATIENCE_S) == 128 + number
        heard = "xrl: stopping at the end of this step; Ctrl-C again ends at once\n" if number == signal.SIGINT else ""
        assert process.stderr.read() == f"{heard}xrl: stopped by {number.name}\n"
