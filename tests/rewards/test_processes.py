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

import pytest

from xrl.rewards.judge import Verdict
from xrl.rewards.processes import ProcessJudges
from xrl.types import Prompt

ODD_JUDGES = Path(__file__).with_name("odd_judges.py")
PROMPT = Prompt(id=0, token_ids=[1, 2], text="?", ground_truth="72", extra={"level": 3})
PATIENCE_S = 60.0


@pytest.fixture
def pool() -> Iterator[ProcessJudges]:
    pool = ProcessJudges(f"{ODD_JUDGES}:as_told", timeout_s=2.0, num_workers=1)
    yield pool
    pool.close()


def verdict_on(pool: ProcessJudges, response: str) -> Verdict:
    return pool.submit(response, PROMPT).result(PATIENCE_S)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_answers_are_judged_by_every_worker() -> None:
    pool = ProcessJudges(f"{ODD_JUDGES}:length", timeout_s=PATIENCE_S, num_workers=2)
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
        ("nan", "bad reward", "finite number, got nan"),
        ("text", "bad reward", "finite number, got '1.0'"),
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


def test_hung_judge_is_killed_with_what_it_started(tmp_path: Path) -> None:
    pool = ProcessJudges(f"{ODD_JUDGES}:starts_another", timeout_s=2.0, num_workers=1)
    assert verdict_on(pool, str(tmp_path / "pids")).failure == "time-out"
    pids = [int(word) for word in (tmp_path / "pids").read_text().split()]
    wait_until(lambda: not any(is_alive(pid) for pid in pids))
    pool.close()


def test_judge_that_ends_itself_takes_along_what_it_started(tmp_path: Path) -> None:
    pool = ProcessJudges(f"{ODD_JUDGES}:leaves_another", timeout_s=PATIENCE_S, num_workers=1)
    assert verdict_on(pool, str(tmp_path / "pid")).detail.endswith("exited with code 7")
    wait_until(lambda: not is_alive(int((tmp_path / "pid").read_text())))
    pool.close()


def test_close_kills_hung_judges_and_cancels_what_waits(tmp_path: Path) -> None:
    pool = ProcessJudges(f"{ODD_JUDGES}:starts_another", timeout_s=3600.0, num_workers=1)
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
    num_threads = threading.active_count()
    pool = ProcessJudges("no.such:judge", timeout_s=1.0, num_workers=4)
    assert threading.active_count() == num_threads
    pool.close()


def test_judge_that_cannot_be_imported_fails_each_answer_with_its_reason() -> None:
    pool = ProcessJudges(f"{ODD_JUDGES}:no_such_function", timeout_s=1.0, num_workers=1)
    verdicts = [verdict_on(pool, "x") for _ in range(5)]
    assert all("has no function 'no_such_function'" in verdict.error for verdict in verdicts)
    assert pool.failures == {"judge did not start": 5}
    pool.close()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends orphans only on Linux")
def test_killed_trainer_takes_its_hung_judges_along(tmp_path: Path) -> None:
    script = f"""
from xrl.rewards.processes import ProcessJudges
from xrl.types import Prompt
pool = ProcessJudges({str(ODD_JUDGES) + ":starts_another"!r}, timeout_s=3600.0, num_workers=1)
pool.submit({str(tmp_path / "pids")!r}, Prompt(id=0, token_ids=[], text="", ground_truth="")).result()
"""
    trainer = subprocess.Popen([sys.executable, "-c", script])
    wait_until(lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text().endswith("\n"))
    judge_pid, grandchild_pid = (int(word) for word in (tmp_path / "pids").read_text().split())
    try:
        trainer.kill()
        trainer.wait()
        wait_until(lambda: not is_alive(judge_pid))
    finally:
        os.kill(grandchild_pid, signal.SIGKILL)
