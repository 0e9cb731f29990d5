"""A process that tries out somebody else's code: what it says, and its end."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from xrl.config import SettingsError
from xrl.launch import trial
from xrl.launch.trial import TrialProcess


@contextmanager
def started(monkeypatch: pytest.MonkeyPatch, program: str, question: str = "") -> Iterator[TrialProcess]:
    """The process runs `program` where a module of ours would run."""
    monkeypatch.setattr(trial, "module_command", lambda module: [sys.executable, "-c", program])
    process = TrialProcess("module", question, environment=os.environ)
    try:
        yield process
    finally:
        process.end()
        assert process.process.poll() is not None


def refusal(monkeypatch: pytest.MonkeyPatch, program: str, *, limit_s: float = 60.0) -> str:
    with started(monkeypatch, program) as process, pytest.raises(SettingsError) as refused:
        process.answer(who="it", limit_s=limit_s)
    return str(refused.value)


def answering(answer: str) -> str:
    return f"from xrl.launch.trial import answer_once\ndef answer_to(question): {answer}\nanswer_once(answer_to)"


def is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_the_answer_arrives_whatever_is_printed_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    program = answering("print('noise'); return {'found': question.upper()}")
    with started(monkeypatch, program, "what") as process:
        assert process.answer(who="it", limit_s=60) == {"found": "WHAT"}


def test_what_the_process_refuses_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(monkeypatch, answering("return {'refused': '--flag is wrong'}")) == "--flag is wrong"


def test_an_end_without_an_answer_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import os, sys; print('panic', file=sys.stderr, flush=True); os.abort()"
    assert refusal(monkeypatch, program) == "it ended the process that tried it out: SIGABRT, panic"
    assert refusal(monkeypatch, "import os; os._exit(3)") == "it ended the process that tried it out: exit code 3"


def test_a_process_that_does_not_answer_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    said = refusal(monkeypatch, "import time; time.sleep(600)", limit_s=0.1)
    assert said == "it was not loaded and tried out within 0.1 s"


def test_what_the_process_has_started_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    program = answering("import subprocess; return {'pid': subprocess.Popen(['sleep', '600']).pid}")
    with started(monkeypatch, program) as process:
        pid = process.answer(who="it", limit_s=60)["pid"]  # does not wait for the sleeper's end of the pipes
    deadline = time.monotonic() + 10.0  # it was killed, and is gone when the system comes to it
    while is_alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.005)
