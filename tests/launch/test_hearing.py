"""Signals are heard by a thread, from a process's first moment on."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from tests.launch.processes import started
from xrl.launch.hearing import hearing

ROOT = Path(__file__).resolve().parents[2]
SENDS = """
import os, signal, subprocess, sys, time
from xrl.launch.hearing import *
def send(name): os.kill(os.getpid(), getattr(signal, name))
"""


def run(program: str) -> tuple[int, str, str]:
    """Exit code, standard output and error of a program."""
    found = subprocess.run(
        [sys.executable, "-c", SENDS + program], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    return found.returncode, found.stdout, found.stderr


def test_a_signal_that_comes_before_anybody_listens_is_kept() -> None:
    assert run(
        "block_signals(); send('SIGUSR1'); send('SIGTERM')\n"
        "heard = []\n"
        "react = lambda number, sender: heard.append((number.name, sender == os.getpid()))\n"
        "with hearing(RUN_SIGNALS, lambda thread: react):\n"
        "    while len(heard) < 2: time.sleep(0.01)\n"
        "print(sorted(heard))"
    ) == (0, "[('SIGTERM', True), ('SIGUSR1', True)]\n", "")


def test_a_child_inherits_the_block_and_can_lift_it() -> None:
    child = f"{SENDS}send('SIGTERM'); print('alive', flush=True); unblock_signals(); print('never')"
    code, out, _ = run(f"block_signals(); sys.exit(-subprocess.call([sys.executable, '-c', {child!r}]))")
    assert (code, out) == (signal.SIGTERM, "alive\n")


def test_a_judge_leaves_requests_to_others_and_its_end_to_who_ends_it() -> None:
    code, out, _ = run(
        "block_signals(); leave_requests_to_others()\n"
        "send('SIGUSR1'); send('SIGUSR2'); print('alive', flush=True); send('SIGTERM'); print('never')"
    )
    assert (code, out) == (-signal.SIGTERM, "alive\n")


def test_by_default_a_signal_raises_in_the_main_thread_whatever_that_waits_for() -> None:
    assert run(
        "try:\n"
        "    with hearing(): send('SIGTERM'); time.sleep(60)\n"
        "except SystemExit as end: print(type(end).__name__, end.signal.name, end.code)"
    ) == (0, f"Stopped SIGTERM {128 + signal.SIGTERM}\n", "")


def test_an_import_is_not_interrupted_but_what_comes_after_it_is() -> None:
    assert run(
        "heard = []\n"
        "def reaction(thread):\n"
        "    return lambda number, sender: (thread.end_by(number, sender), heard.append(number))\n"
        "with hearing(RUN_SIGNALS, reaction):\n"
        "    with uninterrupted():\n"
        "        send('SIGUSR2')\n"
        "        while not heard: time.sleep(0.001)\n"
        "        print('imported', flush=True)\n"
        "    print('never')"
    ) == (128 + signal.SIGUSR2, "imported\n", "")


def test_a_main_thread_that_is_stuck_is_not_waited_for_for_ever() -> None:
    assert run(
        "def reaction(thread):\n"
        "    return lambda number, sender: thread.end(SystemExit(9), within_s=0.1)\n"
        "with hearing(RUN_SIGNALS, reaction), uninterrupted():\n"
        "    send('SIGUSR2'); time.sleep(60)"
    ) == (9, "", "")


def test_afterwards_signals_are_as_they_were() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, []), signal.getsignal(signal.SIGURG)
    with hearing():
        pass
    assert (signal.pthread_sigmask(signal.SIG_BLOCK, []), signal.getsignal(signal.SIGURG)) == before


def test_who_was_to_outlive_its_terminal_does_not_hear_that_it_goes(tmp_path: Path) -> None:
    program = (
        "import pathlib, time, sys; from xrl.launch.hearing import *\n"
        "with hearing(RUN_SIGNALS) as thread:\n"
        "    thread.react = lambda number, sender: (print(number.name, flush=True), thread.end_by(number, sender))\n"
        f"    pathlib.Path({str(tmp_path / 'ready')!r}).touch(); time.sleep(60)"
    )
    with started(tmp_path / "output", "-c", program, nohup=True) as process:
        process.wait_for((tmp_path / "ready").exists)
        process.process.send_signal(signal.SIGHUP)
        assert process.end(process.process.pid, signal.SIGTERM) == 128 + signal.SIGTERM
        assert (tmp_path / "output" / "stdout").read_text() == "SIGTERM\n"
