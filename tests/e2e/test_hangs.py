"""A rank that is stopped or hangs ends the run within 30 seconds of its limit, and is named with what it was at."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.launch.processes import ROOT, Run, started
from tests.small_runs import run_flags, write_rows
from tests.tiny_models import make_checkpoint
from xrl.doctor import examine

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

TWO_RANKS = ("--nproc-per-node", "2", "--tensor-model-parallel-size", "2")
# What is waited for may take 210 s, and the run 600 s more: the limits are 2% of that, but silence is 15 s.
SHORT = (
    *("--hang-limit-scale", "0.02", "--rollout-timeout-s", "60", "--rollout-max-retries", "0"),
    *("--weight-sync-timeout-s", "30", "--judge-timeout-s", "30", "--distributed-timeout-minutes", "1"),
    *("--save-retry-minutes", "0"),
)
# Collectives are looked at after 30 s.
LIMIT_S = 35.0
# From the limit to the end of the last process.
END_LIMIT_S = 30.0
NEED_NAMESPACES = "XRL_TESTS_NEED_NAMESPACES"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model"))


def own(name: str) -> str:
    """A reference to something in a file beside this one."""
    file, _, name = name.partition(":")
    return f"{Path(__file__).with_name(file)}:{name}"


@contextlib.contextmanager
def training(model: Path, folder: Path, *flags: str) -> Iterator[Run]:
    """A run that would train for hours."""
    data = write_rows(folder / "train.jsonl", [{"prompt": f"{n}+1=?", "ground_truth": str(n + 1)} for n in range(8)])
    command = ["-m", "xrl.cli", "train", *run_flags(model, data, folder), *SHORT, "--no-tensorboard"]
    command += ["--num-rollouts", "100000", "--judge", own("digits_judge.py:reward"), *flags]
    with started(folder / "output", *command) as run:
        yield run


def run_folder(folder: Path) -> Path:
    (found,) = (folder / "work").iterdir()
    return found


def has_learned(folder: Path) -> bool:
    return any((folder / "work").glob("*/rollout_idx_2_trajectory.jsonl"))


def reported(run: Run) -> list[str]:
    """The report: its sentence, and a line a rank."""
    code = run.process.wait(LIMIT_S + END_LIMIT_S)
    lines = run.stderr.splitlines()
    assert code == 75, run.stderr[-4000:]
    (first,) = [number for number, line in enumerate(lines) if line.startswith("xrl: error: ")]
    ranks = [line.strip() for line in lines[first + 1 :] if line.startswith("  ")]
    assert "Traceback" not in run.stderr
    return [lines[first].removeprefix("xrl: error: "), *ranks]


def process_of(run: Run, module: str, **variables: str) -> psutil.Process:
    (found,) = (
        process
        for process in run.children()
        if module in process.cmdline() and variables.items() <= process.environ().items()
    )
    return found


def check_ended(processes: list[psutil.Process]) -> None:
    _, left = psutil.wait_procs(processes, timeout=END_LIMIT_S)
    assert not left


def test_a_rank_that_is_stopped_is_named_and_the_doctor_says_the_same_before_and_after(
    model: Path, tmp_path: Path
) -> None:
    with training(model, tmp_path, *TWO_RANKS) as run:
        run.wait_for(lambda: has_learned(tmp_path))
        sentence, *lines = examine(run_folder(tmp_path))
        assert sentence.startswith("2 of 2 ranks have answered within ")
        assert all(line.startswith(("rank 0 on ", "rank 1 on ")) and "; at xrl/" in line for line in lines)
        processes, pid = run.children(), process_of(run, "xrl.train", RANK="1").pid
        os.kill(pid, signal.SIGSTOP)
        sentence, stopped, waiting = reported(run)
        check_ended(processes)
    assert sentence.startswith("rank 1 has not been heard of for ") and "its process is stopped" in sentence
    assert stopped.startswith("rank 1 on ") and f"(pid {pid}): " in stopped and "not heard of for " in stopped
    assert waiting.startswith("rank 0 on ") and "; at xrl/" in waiting
    said = examine(run_folder(tmp_path))
    assert said[0].startswith("the run has ended at ") and said[0].endswith(sentence)
    assert said[1:] == [stopped, waiting]
    assert json.loads((run_folder(tmp_path) / "logs" / "hang.json").read_text())["sentence"] == sentence


@pytest.mark.cluster  # more of the same: `make test-cluster` has the time for it
def test_rank_0_that_is_stopped_is_named_by_the_others(model: Path, tmp_path: Path) -> None:
    with training(model, tmp_path, *TWO_RANKS) as run:
        run.wait_for(lambda: has_learned(tmp_path))
        processes = run.children()
        process_of(run, "xrl.train", RANK="0").send_signal(signal.SIGSTOP)
        sentence, stopped, waiting = reported(run)
        check_ended(processes)
    assert sentence.startswith("rank 0 has not been heard of for ")
    assert stopped.startswith("rank 0 on ") and waiting.startswith("rank 1 on ")
    assert "; in gloo:" in waiting


@pytest.mark.parametrize(
    ("flags", "seen"),
    [
        pytest.param((), "no rank has got anything done for ", marks=pytest.mark.cluster),
        pytest.param(
            ("--hang-limit-scale", "1", "--distributed-timeout-minutes", "0.1"),
            "a collective has waited for ",
            marks=pytest.mark.cluster,
        ),
    ],
    ids=["standstill", "collective"],
)
def test_a_rank_in_an_endless_loop_is_named_with_the_line(
    model: Path, tmp_path: Path, flags: tuple[str, ...], seen: str
) -> None:
    endless = ("--algorithm", own("endless_algorithm.py:Endless"))
    with training(model, tmp_path, *TWO_RANKS, *endless, *flags) as run:
        run.wait_for(lambda: any((tmp_path / "work").glob("*/rollout_idx_1_trajectory.jsonl")))
        sentence, looping, waiting = reported(run)
    assert sentence.startswith(seen)
    assert sentence.endswith("; rank 1 is in no collective, and the others wait for it")
    assert looping.startswith("rank 1 on ") and ": update 1 for " in looping and looping.endswith("in no collective")
    assert re.search(r"; at tests/e2e/endless_algorithm\.py:1[34] loss", looping)
    assert waiting.startswith("rank 0 on ") and "; in gloo:" in waiting


@pytest.mark.cluster  # more of the same: `make test-cluster` has the time for it
def test_a_rollout_worker_that_is_stopped_is_what_rank_0_waits_for(model: Path, tmp_path: Path) -> None:
    with training(model, tmp_path) as run:
        run.wait_for(lambda: has_learned(tmp_path))
        process_of(run, "xrl.rollout.worker").send_signal(signal.SIGSTOP)
        sentence, line = reported(run)
    assert sentence.startswith("rank 0 has got nothing done for ")
    # Whatever it was asked for just then.
    assert re.search(
        r"; waits for \d+ answers to /\S+ of rollout worker 0 \(127\.0\.0\.1:\d+\), the longest for ", line
    )
    assert "; at xrl/rollout/" in line


@pytest.mark.cluster
def test_a_judge_that_hangs_is_what_rank_0_waits_for(model: Path, tmp_path: Path) -> None:
    with training(model, tmp_path, "--judge", own("endless_judge.py:reward")) as run:
        run.wait_for(lambda: list((tmp_path / "work").glob("*/logs/ranks.json")))
        sentence, line = reported(run)
    assert sentence.startswith("rank 0 has got nothing done for ") and "(rollout 1)" in sentence
    assert "; waits for 8 verdicts, the longest for " in line


@pytest.fixture
def link() -> Iterator[tuple[str, list[str], list[str]]]:
    """(this host's address, words before a command on another host, command that cuts the link between the two)."""
    name, cable, network = f"xrl-hang-{os.getpid()}", f"xrlh{os.getpid() % 10000}", f"10.{os.getpid() % 250 + 1}.200"
    with contextlib.ExitStack() as stack:
        try:
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "del", name)
            _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("addr", "add", f"{network}.1/24", "dev", cable)
            _ip("link", "set", cable, "up")
            _ip("-n", name, "addr", "add", f"{network}.2/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            if NEED_NAMESPACES in os.environ:
                raise
            pytest.skip(f"this user cannot make network namespaces: {error}")
        yield cable, ["ip", "netns", "exec", name], ["-n", name, "link", "set", "eth0", "down"]


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.mark.cluster
def test_a_link_that_is_cut_ends_both_sides_and_each_names_the_other(
    tmp_path: Path, link: tuple[str, list[str], list[str]]
) -> None:
    cable, there, cut = link
    address = psutil.net_if_addrs()[cable][0].address
    ranks = []
    for rank, prefix, interface in ((0, [], cable), (1, there, "eth0")):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": "29471"}
        surroundings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": interface}
        environment = os.environ | place | surroundings
        command = [*prefix, sys.executable, str(Path(__file__).with_name("watched_rank.py")), str(tmp_path)]
        ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT))
    try:
        deadline = time.monotonic() + 120
        while not all((tmp_path / f"beats-{rank}").exists() for rank in (0, 1)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        _ip(*cut)
        said = [rank.communicate(timeout=5.0 + END_LIMIT_S)[1] for rank in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait(10)
    assert [process.returncode for process in ranks] == [75, 75]
    for rank, other in ((0, 1), (1, 0)):
        lines = said[rank].splitlines()
        first, silent, own = (line for line in lines if line.startswith(("xrl: ", "  rank ")))
        assert re.match(rf"xrl: error: rank {other} has not been heard of for [5-7] s \(update 1\)", first)
        assert silent.startswith(f"  rank {other} on node{other} ")
        assert own.startswith(f"  rank {rank} on node{rank} ") and "; at tests/e2e/watched_rank.py:" in own
    assert "; in gloo:broadcast #" in said[1]
