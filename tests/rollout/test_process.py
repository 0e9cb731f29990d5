"""A worker as its trainer sees it: how it is started, what it is told and heard of, and how it ends."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rollout.answering_worker import AnsweringWorker
from tests.rollout.fleets import MakeFleet
from tests.rollout.scripted_engine import ScriptedEngine
from tests.rollout.served import Served, served
from xrl.config import SettingsError
from xrl.launch.exit import RunFailed
from xrl.rollout import protocol
from xrl.rollout.access import Access, new_key
from xrl.rollout.answers import WorkerFault
from xrl.rollout.fleet import WorkerGone
from xrl.rollout.process import LOG_TAIL_LINES, RemoteWorker, WorkerProcess

TIMEOUT_S = 60.0
KEY = new_key()
LISTENS = """echo '{"port": 80, "max_requests": 5}'"""
SLEEPS = "exec sleep 60"

StartScript = Callable[..., WorkerProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartScript]:
    """Starts a shell's script in the place of Python; its log is tmp_path/log unless another is given."""
    started: list[WorkerProcess] = []

    def start_worker(*lines: str, arguments: tuple[str, ...] = (), log: Path | None = None) -> WorkerProcess:
        python = tmp_path / "python"
        python.write_text("\n".join(["#!/bin/sh", *lines, ""]))
        python.chmod(0o755)
        worker = WorkerProcess(3, arguments, key=KEY, num_threads=2, log=log or tmp_path / "log", python=python)
        started.append(worker)
        return worker

    yield start_worker
    for worker in started:
        worker.join(0.0)


# Its start.


def test_it_listens_where_its_first_line_says(start: StartScript) -> None:
    worker = start(LISTENS, SLEEPS)
    assert worker.is_ours and not worker.has_ended and worker.is_alive
    worker.wait_until_listening(TIMEOUT_S)
    assert (worker.url, worker.max_requests) == ("http://127.0.0.1:80", 5)
    assert worker.poll() and worker.claim()


def test_before_it_listens_nobody_waits_for_it(start: StartScript) -> None:
    worker = start("printf '{\"port\": 80'", SLEEPS)
    for _ in range(3):
        assert not worker.poll() and not worker.claim()
    assert worker.url == ""


def test_it_is_told_its_threads_and_its_key_where_nobody_else_can_read_it(
    start: StartScript, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", "1")  # of the trainer's world, which is none of the worker's
    monkeypatch.setenv("RANK", "7")
    worker = start(
        'echo "$XRL_WORKER_KEY $OMP_NUM_THREADS [$TORCH_NCCL_BLOCKING_WAIT$RANK]" >&2',
        'echo "$@" >&2',
        LISTENS,
        SLEEPS,
        arguments=("--engine=embedded", "--device=cpu"),
    )
    worker.wait_until_listening(TIMEOUT_S)
    variables, arguments = (tmp_path / "log").read_text().splitlines()
    assert variables == f"{KEY} 2 []"
    expected = f"-m xrl.rollout.worker --engine=embedded --device=cpu --parent-pid {os.getpid()}"
    assert arguments.endswith(expected) and KEY not in arguments


def test_one_that_ends_at_its_start_is_gone_with_its_exit_code_and_the_end_of_its_log(start: StartScript) -> None:
    worker = start("echo 'no such device' >&2", "exit 3")
    with pytest.raises(WorkerGone, match="(?s)rollout worker 3 ended at its start with exit code 3: .*no such device"):
        worker.wait_until_listening(TIMEOUT_S)
    assert worker.has_ended and not worker.is_alive


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("print('no JSON')", "its first line is no JSON"),
        ("print('[1]')", "the answer is \\[1\\], not a JSON object"),
        ('print(\'{"port": 1e5, "max_requests": 5}\')', "port is 100000.0, not a number from 1 to 65535"),
        ('print(\'{"port": 80, "max_requests": -1}\')', "max_requests is -1"),
        ("print('x' * 100_000)", "is longer than 65,536 bytes|is no JSON"),
        ("import sys; sys.stdout.write('{'); sys.stdout.flush()", "did not start within 1 s"),
    ],
)
def test_what_a_worker_prints_at_its_start_is_checked(tmp_path: Path, line: str, words: str) -> None:
    limit_s = 1 if "did not start" in words else 60
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\n{line}\nimport time; time.sleep(60)\n")
    python.chmod(0o755)
    worker = WorkerProcess(0, [], key=new_key(), num_threads=1, log=tmp_path / "log", python=python)
    try:
        with pytest.raises(RunFailed, match=f"rollout worker 0.*({words})"):
            worker.wait_until_listening(limit_s)
    finally:
        worker.join(0.0)


def test_worker_that_cannot_start_shows_the_end_of_its_log(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1, engine="no.such.module:make", update=False)
    with pytest.raises(RuntimeError, match="(?s)ended at its start.*no"):
        fleet.wait_until_ready()


def test_worker_is_heard_where_many_files_are_open(make_fleet: MakeFleet) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip(f"no more than {hard} files may be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        assert make_fleet(1).workers[0]._process.stdout.fileno() > 1024
    finally:
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# Its log.


def test_of_a_log_the_last_lines_are_shown(start: StartScript, tmp_path: Path) -> None:
    worker = start(SLEEPS)
    (tmp_path / "log").write_bytes(b"".join(b"line %d\n" % number for number in range(50)) + b"no text: \xff\n")
    first, *lines = worker.log_tail().split("\n  ")
    assert first == f"the end of {tmp_path / 'log'}:"
    assert len(lines) == LOG_TAIL_LINES and lines[0] == "line 36" and lines[-1] == "no text: \ufffd"
    assert worker.log_place == f"its log is {tmp_path / 'log'}"


def test_a_log_that_somebody_removed_is_no_reason_to_fail(start: StartScript, tmp_path: Path) -> None:
    worker = start(SLEEPS)
    (tmp_path / "log").unlink()
    assert worker.log_tail() == f"its log is {tmp_path / 'log'}, which cannot be read: No such file or directory"


def test_a_worker_goes_without_a_log_that_cannot_be_written(
    start: StartScript, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    worker = start("echo words >&2", LISTENS, SLEEPS, log=tmp_path / "file" / "log")
    worker.wait_until_listening(TIMEOUT_S)
    assert f"{tmp_path / 'file' / 'log'} cannot be written: Not a directory" in caplog.text
    assert "rollout worker 3 goes without" in caplog.text


# Its end.


def test_one_that_is_told_to_end_does(start: StartScript) -> None:
    worker = start(LISTENS, SLEEPS)
    worker.wait_until_listening(TIMEOUT_S)
    worker.terminate()
    worker.join(TIMEOUT_S)
    assert worker.has_ended
    worker.terminate()  # it is gone
    worker.join(TIMEOUT_S)


def test_one_that_does_not_listen_to_that_is_killed(start: StartScript) -> None:
    worker = start("trap '' TERM", LISTENS, SLEEPS)
    worker.wait_until_listening(TIMEOUT_S)
    worker.terminate()
    worker.join(0.05)
    assert worker.has_ended


def test_one_that_is_started_again_listens_anew_and_goes_on_with_its_log(start: StartScript, tmp_path: Path) -> None:
    worker = start("echo started >&2", "sleep 0.05", LISTENS, SLEEPS)
    worker.wait_until_listening(TIMEOUT_S)
    before = worker._process.pid
    worker.restart()
    assert worker.url == "" and worker.is_alive
    worker.wait_until_listening(TIMEOUT_S)
    assert worker._process.pid != before
    assert (tmp_path / "log").read_text() == "started\nstarted\n"


def test_a_process_that_does_not_end_is_left_and_named(make_fleet: MakeFleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xrl.rollout.process.KILL_TIMEOUT_S", 0.05)
    fleet = make_fleet(1)
    process = fleet.workers[0]._process
    monkeypatch.setattr(process, "kill", lambda: None)  # as one that hangs in a driver
    fleet.roster.lose(fleet.workers[0], "it hangs")
    with pytest.raises(WorkerGone, match=f"process {process.pid} of rollout worker 0 was killed and does not end"):
        fleet.reachable()
    monkeypatch.undo()


# One that somebody else started.


@pytest.fixture
def worker() -> Iterator[Served]:
    with served(ScriptedEngine()) as found:
        yield found


def remote(worker: Served, run_id: str = "a-run") -> RemoteWorker:
    return RemoteWorker(1, "127.0.0.1", worker.port, access=Access(key=worker.access.key, run_id=run_id))


def test_a_worker_elsewhere_is_ours_from_its_claim_to_its_end(worker: Served) -> None:
    mine, theirs = remote(worker), remote(worker, "another")
    assert not mine.is_ours and mine.url == f"http://127.0.0.1:{worker.port}" and mine.max_requests is None
    assert theirs.poll()  # to ask is not to take
    assert mine.claim()
    assert mine.max_requests is not None and mine.max_requests > 0
    assert mine.is_alive and not theirs.is_alive
    with pytest.raises(SettingsError, match=f"127.0.0.1:{worker.port}, is in use by run a-run since "):
        theirs.claim()
    mine.terminate()
    assert theirs.claim()
    mine.join(TIMEOUT_S)
    assert not mine.has_ended  # it goes on, for others
    assert worker.call(protocol.HEALTH, method="GET")[0] == 200


def test_a_worker_elsewhere_that_does_not_answer_is_waited_for_and_then_gone(worker: Served) -> None:
    absent = RemoteWorker(1, "127.0.0.1", 9, access=worker.access)
    assert not absent.poll() and not absent.is_alive and not absent.claim()
    with pytest.raises(
        WorkerGone,
        match=r"rollout worker 1 of --rollout-worker-urls did not answer at http://127\.0\.0\.1:9 within 0 s: start it "
        r"there with `xrl worker --host 127\.0\.0\.1 \.\.\.`",
    ):
        absent.wait_until_listening(0.0)
    remote(worker).wait_until_listening(TIMEOUT_S)


def test_a_worker_elsewhere_is_started_again_by_nobody_here(worker: Served) -> None:
    with pytest.raises(WorkerGone, match="it was started elsewhere, and can only be started again there"):
        remote(worker).restart()
    assert remote(worker).log_place == f"its log is where it was started, at http://127.0.0.1:{worker.port}"
    assert remote(worker).log_tail() == remote(worker).log_place


@pytest.mark.parametrize("says", [{}, {"max_requests": 0}, {"max_requests": "5"}])
def test_what_is_there_and_does_not_say_what_a_worker_says_is_no_worker(says: dict[str, Any]) -> None:
    other = AnsweringWorker(health=says)
    try:
        found = RemoteWorker(1, "127.0.0.1", other.port, access=Access(key=KEY, run_id="a-run"))
        for ask in (found.poll, found.claim):
            with pytest.raises(WorkerFault, match=r"rollout worker 1 \(127\.0\.0\.1:\d+\): max_requests is "):
                ask()
        assert not found.is_alive
    finally:
        other.close()
