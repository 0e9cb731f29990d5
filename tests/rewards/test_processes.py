"""Judges in processes: bounded, replaced when they die, gone when the pool is."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest

from xrl.config import SettingsError
from xrl.rewards.descendants import read_process
from xrl.rewards.limits import JudgeLimits
from xrl.rewards.process import JudgeSetup
from xrl.rewards.processes import ProcessJudges
from xrl.types import Prompt, Verdict

ODD_JUDGES = Path(__file__).with_name("odd_judges.py")
PROMPT = Prompt(id=0, token_ids=[1, 2], text="?", ground_truth="72", extra={"level": 3})
PATIENCE_S = 60.0


def judges(reference: str, *, timeout_s: float = PATIENCE_S, num_workers: int = 1, **setup: Any) -> ProcessJudges:
    return ProcessJudges(JudgeSetup(reference=reference, **setup), timeout_s=timeout_s, num_workers=num_workers)


@pytest.fixture
def pool() -> Iterator[ProcessJudges]:
    pool = judges(f"{ODD_JUDGES}:as_told", timeout_s=2.0)
    yield pool
    pool.close()


def verdict_on(pool: ProcessJudges, response: str) -> Verdict:
    return pool.submit(response, PROMPT).result(PATIENCE_S)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def state_of(pid: int) -> str:
    """A letter, T for one that is stopped; empty for one that is gone, or only waits to be reaped."""
    process = read_process(pid)
    return "" if process is None or process.state == "Z" else process.state


def is_alive(pid: int) -> bool:
    return bool(state_of(pid))


def test_answers_are_judged_by_every_worker() -> None:
    pool = judges(f"{ODD_JUDGES}:length", num_workers=2)
    futures = [pool.submit("x" * length, PROMPT) for length in range(50)]
    assert [future.result(PATIENCE_S) for future in futures] == [Verdict(reward=float(n)) for n in range(50)]
    assert (pool.num_judged, pool.num_failed) == (50, 0)
    pool.close()


@pytest.mark.parametrize(
    ("response", "failure", "detail"),
    [
        ("hang", "time-out", "no reward within 2 s"),
        ("hang in C", "time-out", "no reward within 2 s"),
        ("raise", "ZeroDivisionError", "division by zero"),
        ("raise more", "EndOfAll", "(its message cannot be shown) ("),
        ("interrupt", "KeyboardInterrupt", "odd_judges.py, line "),
        ("surrogate", "ValueError", r"\ud800 ("),
        ("exit", "SystemExit", "3"),
        ("vanish", "process died", "exited with code 7"),
        ("segfault", "process died", "was ended by SIGSEGV"),
        ("nan", "bad reward", "to 1,000,000, got nan"),
        ("text", "bad reward", "to 1,000,000, got '1.0'"),
        ("nothing", "None", "the judge could not say"),
    ],
)
def test_failed_judge_gives_no_reward_and_the_next_answer_is_judged(
    pool: ProcessJudges, response: str, failure: str, detail: str
) -> None:
    verdict = verdict_on(pool, response)
    assert (verdict.reward, verdict.failed, verdict.failure) == (None, True, failure)
    assert detail in verdict.error
    assert not verdict_on(pool, "pid").failed
    assert (pool.num_judged, pool.failures) == (2, {failure: 1})


def test_each_kind_of_failure_is_logged_once(pool: ProcessJudges, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for response in ("raise", "nan", "raise", "nan"):
            verdict_on(pool, response)
    assert [record.message.split(": ")[1] for record in caplog.records] == ["ZeroDivisionError", "bad reward"]
    assert pool.num_failed == 4


def test_judge_process_has_neither_torch_nor_the_caller_s_main(pool: ProcessJudges) -> None:
    assert verdict_on(pool, "torch?").reward == 0
    assert verdict_on(pool, "main").reward == 0


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_judge_leaves_signals_that_ask_a_run_to_stop_to_the_run(pool: ProcessJudges, number: signal.Signals) -> None:
    judge = int(verdict_on(pool, "pid").reward or 0)
    found = read_process(judge)
    assert found is not None
    for process in (found.parent, judge):  # the keeper, too
        os.kill(process, number)
    assert verdict_on(pool, "pid").reward == judge


def test_hung_judge_is_killed_with_what_it_started(tmp_path: Path) -> None:
    pool = judges(f"{ODD_JUDGES}:starts_another", timeout_s=2.0)
    assert verdict_on(pool, str(tmp_path / "pids")).failure == "time-out"
    pids = [int(word) for word in (tmp_path / "pids").read_text().split()]
    wait_until(lambda: not any(is_alive(pid) for pid in pids))
    pool.close()


def test_judge_that_ends_itself_takes_along_what_it_started(tmp_path: Path) -> None:
    pool = judges(f"{ODD_JUDGES}:leaves_another")
    assert verdict_on(pool, str(tmp_path / "pid")).detail.endswith("exited with code 7")
    wait_until(lambda: not is_alive(int((tmp_path / "pid").read_text())))
    pool.close()


def test_close_kills_hung_judges_and_cancels_what_waits(tmp_path: Path) -> None:
    pool = judges(f"{ODD_JUDGES}:starts_another", timeout_s=3600.0)
    hung = pool.submit(str(tmp_path / "pids"), PROMPT)
    waiting = pool.submit("never", PROMPT)
    wait_until(lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text().endswith("\n"))
    pool.close()
    pool.close()
    pids = [int(word) for word in (tmp_path / "pids").read_text().split()]
    assert hung.result(PATIENCE_S).failed
    with pytest.raises(CancelledError):
        waiting.result(PATIENCE_S)
    wait_until(lambda: not any(is_alive(pid) for pid in pids))
    assert pool.num_failed == 0
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit("late", PROMPT)


def test_pool_that_was_never_asked_starts_nothing_and_closes() -> None:
    before = set(threading.enumerate())  # those of other tests may end meanwhile
    pool = judges("no.such:judge", num_workers=4)
    assert set(threading.enumerate()) <= before
    pool.close()


def test_judge_that_cannot_be_imported_fails_each_answer_with_its_reason() -> None:
    pool = judges(f"{ODD_JUDGES}:no_such_function")
    verdicts = [verdict_on(pool, "x") for _ in range(5)]
    assert all("has no function 'no_such_function'" in verdict.error for verdict in verdicts)
    assert pool.failures == {"judge did not start": 5}
    pool.close()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends orphans only on Linux")
def test_killed_trainer_takes_its_hung_judges_along(tmp_path: Path) -> None:
    script = f"""
from xrl.rewards.process import JudgeSetup
from xrl.rewards.processes import ProcessJudges
from xrl.types import Prompt, Verdict
setup = JudgeSetup(reference={str(ODD_JUDGES) + ":starts_another"!r})
pool = ProcessJudges(setup, timeout_s=3600.0, num_workers=1)
pool.submit({str(tmp_path / "pids")!r}, Prompt(id=0, token_ids=[], text="", ground_truth="")).result()
"""
    trainer = subprocess.Popen([sys.executable, "-c", script])
    wait_until(lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text().endswith("\n"))
    pids = [int(word) for word in (tmp_path / "pids").read_text().split()]
    trainer.kill()
    trainer.wait(PATIENCE_S)
    wait_until(lambda: not any(is_alive(pid) for pid in pids))


@pytest.mark.parametrize(
    ("response", "failure", "detail"),
    [
        ("pickle", "bad message", ""),
        ("wrong length", "bad message", "a message of 4294967295 bytes"),
        ("flood", "bad message", "began a message of"),
        ("answer another question", "bad message", "answered question 999"),
        ("infinite reward", "bad message", "not JSON"),
        ("too large a reward", "bad reward", "got 1e+308"),
        ("half a message", "time-out", "its answer was not whole"),
        ("byte now and then", "time-out", "its answer was not whole"),
        ("close the socket", "process died", "closed its socket"),
        ("kill the keeper", "process died", ""),
        ("odd words", r"E\x1b\n", r"\x1b[2J\x9b\u202exrl: error: forged"),
    ],
)
def test_whatever_a_judge_writes_costs_one_answer(
    pool: ProcessJudges, response: str, failure: str, detail: str
) -> None:
    verdict = verdict_on(pool, response)
    assert (verdict.reward, verdict.failure) == (None, failure)
    assert detail in verdict.detail and verdict.error.isprintable()
    assert verdict_on(pool, "pid").reward
    assert pool.failures == {failure: 1}


def test_pickle_of_a_judge_is_not_run(pool: ProcessJudges, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would write the id of the process that runs it to a file."""
    monkeypatch.chdir(tmp_path)
    assert verdict_on(pool, "pickle").failed
    assert list(tmp_path.iterdir()) == []


def test_what_a_judge_writes_after_its_answer_costs_the_next_one(pool: ProcessJudges) -> None:
    assert verdict_on(pool, "speak later").reward == 1
    wait_until(lambda: verdict_on(pool, "pid").failed)
    assert pool.failures == {"bad message": 1}
    assert not verdict_on(pool, "pid").failed


def test_judge_that_stops_reading_is_stopped(pool: ProcessJudges) -> None:
    pid = int(verdict_on(pool, "pid").reward or 0)
    assert verdict_on(pool, "stop reading").reward == 1
    wait_until(lambda: state_of(pid) == "T")
    large = Prompt(id=0, token_ids=[], text="x" * 5_000_000, ground_truth="72")
    verdict = pool.submit("pid", large).result(PATIENCE_S)
    assert verdict.failure == "time-out" and "did not read the question" in verdict.detail
    assert not pool.submit("pid", large).result(PATIENCE_S).failed


def test_kinds_of_failure_are_bounded(pool: ProcessJudges) -> None:
    for _ in range(40):
        verdict_on(pool, "raise a new kind")
    assert pool.failures["other failures"] == 8 and pool.num_failed == 40


@pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux's")
@pytest.mark.parametrize(
    ("response", "failure", "detail"),
    [
        ("take memory", "MemoryError", "see --judge-memory-gb"),
        ("take shared memory", "memory limit", "more than --judge-memory-gb 0.3"),
        ("take processes", "process limit", "more than --judge-max-processes 8"),
        ("write a large file", "OSError", "see --judge-max-file-gb"),
    ],
)
def test_judge_over_a_limit_fails_that_answer(tmp_path: Path, response: str, failure: str, detail: str) -> None:
    limits = JudgeLimits(memory_bytes=300_000_000, max_processes=8, max_file_bytes=1_000_000)
    pool = judges(f"{ODD_JUDGES}:as_told", limits=limits)
    prompt = Prompt(id=0, token_ids=[], text="", ground_truth="", extra={"file": str(tmp_path / "file")})
    verdict = pool.submit(response, prompt).result(PATIENCE_S)
    assert verdict.failure == failure and detail in verdict.detail
    assert not verdict_on(pool, "pid").failed
    pool.close()


@pytest.mark.parametrize("way", ["start a session", "fork twice", "start a session and exit"])
def test_nothing_that_a_judge_started_is_left(tmp_path: Path, way: str) -> None:
    pool = judges(f"{ODD_JUDGES}:as_told")
    prompt = Prompt(id=0, token_ids=[], text="", ground_truth="", extra={"file": str(tmp_path / "pid")})
    pool.submit(way, prompt).result(PATIENCE_S)
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n"))
    pid = int((tmp_path / "pid").read_text())
    assert is_alive(pid) or way == "start a session and exit"
    pool.close()
    wait_until(lambda: not is_alive(pid))


def test_judge_whose_keeper_is_stopped_or_killed_is_ended_all_the_same(tmp_path: Path) -> None:
    for way in ("stop the keeper", "kill the keeper"):
        pool = judges(f"{ODD_JUDGES}:as_told")
        file = tmp_path / way
        prompt = Prompt(id=0, token_ids=[], text="", ground_truth="", extra={"file": str(file)})
        pool.submit("start a session", prompt).result(PATIENCE_S)
        wait_until(lambda file=file: file.exists() and file.read_text().endswith("\n"))  # type: ignore[misc]
        pids = [int(verdict_on(pool, "pid").reward or 0), int(file.read_text())]
        pool.submit(way, prompt).result(PATIENCE_S)
        pool.close()
        wait_until(lambda pids=pids: not any(is_alive(pid) for pid in pids))  # type: ignore[misc]


def test_judge_s_environment_and_output_are_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("MY_API_KEY", "wanted")
    pool = judges(f"{ODD_JUDGES}:as_told", variables=["MY_API_KEY"], log_dir=tmp_path)
    assert verdict_on(pool, "secrets").reward == 0
    assert verdict_on(pool, "MY_API_KEY").reward == 1
    assert verdict_on(pool, "print").reward == 1
    assert verdict_on(pool, "print much").reward == 1
    pool.close()
    assert capfd.readouterr() == ("", "")
    log = (tmp_path / "judge_0.log").read_text()
    assert log.startswith("on stdout\non stderr\n") and "bytes more were dropped]" in log[-80:]
    assert len(log) < 11_000_000


def test_judge_that_dies_at_its_start_is_shown_by_its_last_words(tmp_path: Path) -> None:
    file = tmp_path / "dies.py"
    file.write_text("import os\nprint('no licence \\x1b[2J found')\nos._exit(3)\n")
    pool = judges(f"{file}:reward")
    with pytest.raises(SettingsError, match=r"its process ended while importing it; .*no licence .*x1b\[2J found"):
        pool.start_one()
    pool.close()


def test_prompt_that_cannot_be_sent_fails_one_answer(pool: ProcessJudges) -> None:
    prompt = Prompt(id=0, token_ids=[], text="", ground_truth="", extra={"a": {1, 2}})
    verdict = pool.submit("pid", prompt).result(PATIENCE_S)
    assert (verdict.failure, "a set" in verdict.detail) == ("not carried", True)
    assert not verdict_on(pool, "pid").failed


def test_process_that_cannot_be_started_fails_one_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a judge before it has used up the machine's processes."""
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    pool = judges(f"{ODD_JUDGES}:as_told")
    verdict = verdict_on(pool, "pid")
    assert verdict.failure == "judge did not start" and "cannot be started: No such file" in verdict.detail
    monkeypatch.undo()
    assert not verdict_on(pool, "pid").failed
    pool.close()


def test_judge_that_misses_a_variable_is_told_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "secret")
    file = tmp_path / "asks.py"
    for text, says in (
        ("import os\ndef reward(response, prompt):\n    return len(os.environ['MY_API_KEY'])\n", "MY_API_KEY"),
        ("def reward(response, prompt):\n    return {}['other']\n", ""),
    ):
        file.write_text(text)
        pool = judges(f"{file}:reward")
        hint = f"; --judge-env {says} would hand that variable to the judge" if says else "'other'"
        assert verdict_on(pool, "x").detail.endswith(hint)
        pool.close()
    file.write_text("import os\nos.environ['MY_API_KEY']\n")
    pool = judges(f"{file}:reward")
    with pytest.raises(SettingsError, match="KeyError: 'MY_API_KEY' .*; --judge-env MY_API_KEY would hand"):
        pool.start_one()
    pool.close()
