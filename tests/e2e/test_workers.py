"""Whole runs whose rollout workers die, and whose rollout workers are on other hosts."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.small_runs import run_flags, write_rows
from tests.tiny_models import make_checkpoint

ROOT = Path(__file__).resolve().parents[2]
LARGEST_DIFFERENCE = 1e-5
# Set where hosts must be network namespaces, not addresses of one.
NEED_NAMESPACES = "XRL_TESTS_NEED_NAMESPACES"

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def train(folder: Path, *flags: str, **variables: str) -> tuple[list[dict[str, float]], str]:
    """Rows of metrics, one a rollout, and what the run said."""
    found = start(folder, *flags, **variables)
    assert found.returncode == 0, found.stderr[-4000:]
    (run,) = (folder / "work").iterdir()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "reward/mean" in row], found.stdout + found.stderr


def start(folder: Path, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A small run, to its end."""
    model = make_checkpoint(folder / "model")
    # Judged by digits: answers of a random model get different rewards, so that there is something to learn.
    data = write_rows(folder / "train.jsonl", [{"prompt": f"{n}+1=?", "ground_truth": str(n + 1)} for n in range(8)])
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    judge = f"{Path(__file__).with_name('digits_judge.py')}:reward"
    return subprocess.run(
        [
            *(sys.executable, "-m", "xrl.cli", "train", *run_flags(model, data, folder), "--judge", judge),
            *("--lr", "1e-3", "--no-tensorboard", *flags),
        ],
        capture_output=True,
        text=True,
        env=environment | variables,
        timeout=300,
    )


def answers(folder: Path, rollout: int) -> Counter[int]:
    """How many answers each prompt has in a rollout's trajectory."""
    (run,) = (folder / "work").iterdir()
    _, *samples = (run / f"rollout_idx_{rollout}_trajectory.jsonl").read_text().splitlines()
    return Counter(json.loads(sample)["prompt"] for sample in samples)


def test_run_loses_a_worker_in_a_rollout_and_one_in_an_update_and_no_sample(tmp_path: Path) -> None:
    (tmp_path / "deaths").mkdir()
    rows, said = train(
        tmp_path,
        *("--engine", "tests.e2e.faulty_engines:DyingEngine", "--rollout-num-workers", "3", "--num-rollouts", "7"),
        XRL_TEST_DEATHS=str(tmp_path / "deaths"),
    )
    assert sorted(path.name for path in (tmp_path / "deaths").iterdir()) == ["loading", "sampling"]
    # Rollout n is sampled with weights n - 1: the first dies in rollout 3, the second in the update to weights 4.
    assert [row["workers/lost"] for row in rows[:4]] == [0, 0, 1, 2]
    assert rows[-1]["workers/lost"] == rows[-1]["workers/restarted"] == 2
    assert rows[2]["prompts/retried"] >= 1
    assert sum(row["prompts/failed"] for row in rows) == 0
    assert "is lost (weights version 4, layers.2: " in said
    for number, row in enumerate(rows, start=1):
        counts = answers(tmp_path, number)
        assert sorted(counts.values()) == [2] * 4
        assert row["mismatch"] <= LARGEST_DIFFERENCE and row["canary"] <= LARGEST_DIFFERENCE


@pytest.mark.parametrize("ranks", [1, 2])
def test_run_whose_only_worker_dies_twice_in_an_update_goes_on_when_it_is_back(tmp_path: Path, ranks: int) -> None:
    rows, said = train(
        tmp_path,
        *("--engine", "tests.e2e.faulty_engines:TwiceDyingEngine", "--rollout-num-workers", "1"),
        *("--num-rollouts", "4", "--nproc-per-node", str(ranks), "--tensor-model-parallel-size", str(ranks)),
        XRL_TEST_DEATHS=str(tmp_path),
    )
    assert said.count("weights version 2 have no rollout worker any more: they are published anew") == 2
    assert [row["workers/lost"] for row in rows] == [row["workers/restarted"] for row in rows] == [0, 2, 2, 2]
    assert all(row["workers/updated"] == 1 and row["sync/layers"] == 6 for row in rows)
    assert sum(row["prompts/failed"] + row["prompts/retried"] for row in rows) == 0
    for row in rows:
        assert row["mismatch"] <= LARGEST_DIFFERENCE and row["canary"] <= LARGEST_DIFFERENCE


def test_run_whose_only_worker_dies_in_each_update_ends_when_it_has_been_started_as_often_as_allowed(
    tmp_path: Path,
) -> None:
    found = start(
        tmp_path,
        *("--engine", "tests.e2e.faulty_engines:TwiceDyingEngine", "--rollout-num-workers", "1"),
        *("--num-rollouts", "4", "--rollout-max-restarts", "1"),
        XRL_TEST_DEATHS=str(tmp_path),
    )
    assert found.returncode == 1 and "Traceback" not in found.stderr
    (line,) = [line for line in found.stderr.splitlines() if line.startswith("xrl: error: ")]
    assert line.startswith("xrl: error: no rollout worker is left (rollout worker 0 (127.0.0.1:")
    assert ": weights version 2, layers." in line


def test_run_ends_where_answers_differ_from_the_actor_and_saves_nothing_of_them(tmp_path: Path) -> None:
    """The canary is sampled rightly, and what is trained on is not."""
    flags = ("--engine", "tests.e2e.faulty_engines:MisstatingEngine", "--num-rollouts", "2")
    found = start(tmp_path, *flags)
    assert found.returncode == 1 and "Traceback" not in found.stderr
    (line,) = [line for line in found.stderr.splitlines() if line.startswith("xrl: error: ")]
    assert line.startswith("xrl: error: rollout 1: log-probs of the answers differ from the actor's by 0.5 on average")
    (run,) = (tmp_path / "work").iterdir()
    assert not list(run.glob("hf-*"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_run_whose_only_worker_dies_in_a_rollout_goes_on_when_it_is_back(tmp_path: Path, ranks: int) -> None:
    deaths = tmp_path / "deaths"
    deaths.mkdir()
    (deaths / "loading").touch()  # this death has been died
    rows, said = train(
        tmp_path,
        *("--engine", "tests.e2e.faulty_engines:DyingEngine", "--rollout-num-workers", "1", "--num-rollouts", "4"),
        *("--nproc-per-node", str(ranks), "--tensor-model-parallel-size", str(ranks), "--rollout-max-batch-size", "4"),
        XRL_TEST_DEATHS=str(deaths),
    )
    assert (deaths / "sampling").exists()
    assert "no rollout worker is ready: weights version 2 are published once more" in said
    assert [row["workers/lost"] for row in rows] == [row["workers/restarted"] for row in rows] == [0, 0, 1, 1]
    assert rows[2]["prompts/retried"] >= 1
    assert sum(row["prompts/failed"] for row in rows) == 0
    for number, row in enumerate(rows, start=1):
        assert sorted(answers(tmp_path, number).values()) == [2] * 4
        assert row["mismatch"] <= LARGEST_DIFFERENCE and row["canary"] <= LARGEST_DIFFERENCE


def test_answers_cut_off_in_one_rollout_go_on_in_the_next(tmp_path: Path) -> None:
    rows, _ = train(
        tmp_path,
        *("--partial-rollout", "--oversampling", "2", "--rollout-max-batch-size", "3", "--num-rollouts", "6"),
        # Weights that stay the same: log-probs of both parts must then be the actor's.
        *("--lr", "0", "--on-nothing-learned", "warn"),
    )
    assert sum(row["prompts/unfinished"] for row in rows) > 0
    assert sum(row["samples/continued"] for row in rows) > 0
    for number, row in enumerate(rows, start=1):
        assert row["groups/total"] == 4
        assert sorted(answers(tmp_path, number).values()) == [2] * 4
        assert row["mismatch"] <= LARGEST_DIFFERENCE


def test_actor_and_engines_that_take_turns_compute_the_same(tmp_path: Path) -> None:
    flags = ("--num-rollouts", "3", "--nproc-per-node", "2", "--tensor-model-parallel-size", "2", "--kl-coef", "0.05")
    flags += ("--updates-per-rollout", "2", "--engine", "tests.e2e.faulty_engines:NotingEngine")
    found = {}
    for name in ("apart", "colocated"):
        folder = tmp_path / name
        folder.mkdir()
        turns = ("--colocate",) if name == "colocated" else ()
        rows, _ = train(folder, *flags, *turns, XRL_TEST_NOTES=str(folder / "notes"))
        same = ("reward/mean", "loss", "kl", "grad_norm", "mismatch", "canary")
        found[name] = [{key: row[key] for key in same if key in row} for row in rows]
        notes = [note for note, _ in itertools.groupby((folder / "notes").read_text().split("\n")[:-1])]
        if turns:
            # Sleep comes twice: before the update, and again before the weights, for workers that are new by then.
            assert notes == ["sleep", "load", "wake", "submit"] * 4
            assert all("seconds/turns" in row for row in rows)
        else:
            assert notes == ["load", "submit"] * 4
    assert found["apart"] == found["colocated"]
    assert len(found["apart"]) == 3 and len(found["apart"][0]) >= 5


def test_canary_ends_a_run_whose_engine_takes_one_norm_for_the_other(tmp_path: Path) -> None:
    found = start(tmp_path, "--engine", "tests.e2e.faulty_engines:SwappingEngine", "--num-rollouts", "1")
    assert found.returncode == 1
    (line,) = [line for line in found.stderr.splitlines() if line.startswith("xrl: error: ")]
    assert line.startswith("xrl: error: canary: after the update to weights version 0 an engine's log-probs differ ")
    assert "Traceback" not in found.stderr
    assert not list((tmp_path / "work").glob("*/rollout_idx_*"))  # nothing was sampled for training


@pytest.fixture
def hosts() -> Iterator[list[tuple[str, list[str]]]]:
    """(address, words before a command that runs there) of two hosts: network namespaces where we may make them."""
    names = [f"xrl-test-{os.getpid()}-{number}" for number in range(2)]
    found = []
    with contextlib.ExitStack() as stack:
        try:
            for number, name in enumerate(names):
                # Of this process: hosts of a run that was killed may still be there.
                link, network = f"xrl{os.getpid() % 10000}{number}", f"10.{os.getpid() % 250 + 1}.{number}"
                _ip("netns", "add", name)
                stack.callback(_ip, "netns", "del", name)
                _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
                _ip("addr", "add", f"{network}.1/24", "dev", link)
                _ip("link", "set", link, "up")
                _ip("-n", name, "addr", "add", f"{network}.2/24", "dev", "eth0")
                _ip("-n", name, "link", "set", "eth0", "up")
                found.append((f"{network}.2", ["ip", "netns", "exec", name]))
        except (OSError, subprocess.CalledProcessError) as error:
            if NEED_NAMESPACES in os.environ:
                raise
            warnings.warn(f"two loopback addresses stand for two hosts: {error}", stacklevel=1)
            found = [(f"127.0.0.{2 + number}", []) for number in range(2)]
        yield found


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextlib.contextmanager
def worker_on(host: str, prefix: list[str], folder: Path) -> Iterator[str]:
    """The address of a worker that was started there."""
    command = [*prefix, sys.executable, "-m", "xrl.cli", "worker", "--model", str(folder / "model")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "XDG_CONFIG_HOME": str(folder)}
    with (folder / f"worker_{host}.log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--max-model-len", "64", "--host", host, "--parent-pid", str(os.getpid())],
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
        )
    try:
        assert process.stdout is not None
        yield f"{host}:{json.loads(process.stdout.readline())['port']}"
    finally:
        process.kill()
        process.wait()


def test_workers_on_two_hosts_follow_twenty_updates_of_four_ranks(
    tmp_path: Path, hosts: list[tuple[str, list[str]]]
) -> None:
    make_checkpoint(tmp_path / "model")
    with contextlib.ExitStack() as stack:
        addresses = [stack.enter_context(worker_on(host, prefix, tmp_path)) for host, prefix in hosts]
        rows, _ = train(
            tmp_path,
            *("--nproc-per-node", "4", "--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"),
            *("--rollout-worker-urls", ",".join(addresses), "--num-rollouts", "20"),
            XDG_CONFIG_HOME=str(tmp_path),
        )
    assert len(rows) == 20
    for row in rows:
        assert row["mismatch"] <= LARGEST_DIFFERENCE
        assert row["canary"] <= LARGEST_DIFFERENCE
        assert (row["sync/layers"], row["sync/resent"], row["workers/updated"]) == (6, 0, 2)
    assert any(row["grad_norm"] > 0 for row in rows)
