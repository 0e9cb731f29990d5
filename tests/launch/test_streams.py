"""Standard streams that the parent closed, or that nobody reads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

START = "import os, sys; from xrl.launch.streams import prepare_streams; prepare_streams()\n"
# What a shell writes behind a command to start it without these streams.
CLOSED = ["<&-", ">&-", "2>&-", "<&- >&-", ">&- 2>&-", "<&- >&- 2>&-"]


def shell(program: str, redirections: str, *, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a Python program behind `prepare_streams`, with a shell's redirections."""
    file = folder / "program.py"
    file.write_text(START + program)
    command = f"exec {sys.executable} {file} {redirections}"
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, env={**os.environ, **variables})


@pytest.mark.parametrize("redirections", CLOSED)
def test_no_file_takes_the_place_of_a_closed_stream(tmp_path: Path, redirections: str) -> None:
    program = (
        f"file = open({str(tmp_path / 'model')!r}, 'w')\n"
        "print('to whom it may concern'); print('a log line', file=sys.stderr); sys.stdin.read()\n"
        "os.system('echo from a child; echo from a child >&2')\n"
        "sys.exit(0 if file.fileno() > 2 else 9)"
    )
    found = shell(program, redirections, folder=tmp_path)
    assert found.returncode == 0
    assert (tmp_path / "model").read_text() == ""
    assert "Error" not in found.stderr


def test_open_streams_say_what_they_said(tmp_path: Path) -> None:
    found = shell(
        "print('result'); print('log', file=sys.stderr); print(sys.stdin.read())", "<<<typed", folder=tmp_path
    )
    assert (found.returncode, found.stdout, found.stderr) == (0, "result\ntyped\n\n", "log\n")


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_writing_goes_on_without_a_reader(tmp_path: Path, stream: str) -> None:
    program = (
        "for number in range(3): print('line', number, file=sys.STREAM, flush=True)\n"
        "os.system('echo from a child'); open(sys.argv[1], 'w').write('the end'); print('unflushed', file=sys.STREAM)"
    ).replace("STREAM", stream)
    read_end, write_end = os.pipe()
    os.close(read_end)
    file = tmp_path / "program.py"
    file.write_text(START + program)
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {stream: write_end}
    found = subprocess.run([sys.executable, file, tmp_path / "done"], text=True, **both)
    os.close(write_end)
    assert found.returncode == 0
    assert (tmp_path / "done").read_text() == "the end"
    assert (found.stderr or "") == "" and (found.stdout or "") in ("", "from a child\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full is Linux's")
def test_results_that_cannot_be_stored_are_missed_and_log_lines_are_not(tmp_path: Path) -> None:
    found = shell("print('result')", ">/dev/full", folder=tmp_path)
    assert found.returncode == 1
    assert found.stderr == "xrl: error: standard output cannot be written to: No space left on device\n"
    found = shell("print('log', file=sys.stderr); print('result')", "2>/dev/full", folder=tmp_path)
    assert (found.returncode, found.stdout) == (0, "result\n")


def test_characters_that_the_environment_does_not_know_are_escaped(tmp_path: Path) -> None:
    found = shell("print('é', '\\udce9')", "", folder=tmp_path, PYTHONIOENCODING="ascii")
    assert (found.returncode, found.stdout) == (0, "\\xe9 \\udce9\n")
