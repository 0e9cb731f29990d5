"""Real worker processes around a scripted engine: spreading, retries, deaths, updates, clean-up."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.rollout.fleets import ROOT, MakeFleet, bucket, generate, request
from tests.rollout.scripted_engine import ANSWER, DIE, FAIL, FAIL_ONCE, HANG, LINGER, SLOW, SLOW_S
from xrl.rollout import protocol
from xrl.rollout.fleet import RolloutCounts, WorkerGone
from xrl.rollout.publish import WeightStream
from xrl.types import Completion


def test_every_prompt_is_answered_once_by_some_worker(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2, rollout_max_batch_size=4)
    results, counts = generate(fleet, [request(place) for place in range(40)])
    assert sorted(results) == list(range(40))
    for place, completions in results.items():
        assert completions is not None
        assert [completion.token_ids.tolist() for completion in completions] == [[ANSWER, place]] * 2
    assert counts == RolloutCounts(sent=40, finished=40)


def test_failing_request_is_retried_and_counted(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2)
    results, counts = generate(fleet, [request(0), request(1, FAIL_ONCE), request(2)])
    assert all(results.values())
    assert counts.finished == 3
    assert counts.retried >= 1


def test_request_that_always_fails_is_given_up_and_the_others_finish(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1, rollout_max_retries=2)
    results, counts = generate(fleet, [request(0), request(1, FAIL), request(2)])
    assert results[1] is None
    assert results[0] and results[2]
    assert counts == RolloutCounts(sent=3, finished=2, failed=1, retried=2)


def test_request_without_an_answer_runs_into_the_time_out(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1, rollout_timeout_s=0.5, rollout_max_retries=1)
    results, counts = generate(fleet, [request(0, HANG), request(1)])
    assert results[0] is None
    assert results[1]
    assert counts.failed == 1


def test_request_that_ran_into_the_time_out_may_still_be_ending_in_the_engine(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1, rollout_timeout_s=0.3, rollout_max_retries=1)
    results, counts = generate(fleet, [request(0, LINGER)])
    assert results == {0: None}
    assert counts == RolloutCounts(sent=1, failed=1, retried=1)
    log = fleet.workers[0].log.read_text()
    assert "already in flight" not in log  # neither try stood in the other's way
    # The next weights wait for it.
    WeightStream(fleet).publish([bucket("layers.0", 1.0, version=1)], version=1)


def test_prompts_of_a_worker_that_dies_go_to_the_other_one(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2, rollout_max_batch_size=8, rollout_max_retries=3)
    victim = fleet.workers[0]._process
    requests = [request(place) for place in range(30)]
    counts = RolloutCounts()
    results = {}
    for place, completions in fleet.generate(requests, counts):
        if not results:
            victim.send_signal(signal.SIGKILL)
            victim.wait()
        assert place not in results
        results[place] = completions
    assert sorted(results) == list(range(30))
    assert all(results.values())
    assert len(fleet.ready()) == 1
    again, _ = generate(fleet, requests)
    assert all(again.values())


def test_prompts_of_a_worker_that_is_told_to_end_go_to_the_other_one(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2, rollout_max_batch_size=8)
    victim = fleet.workers[0]._process
    threading.Timer(SLOW_S / 4, victim.terminate).start()
    results, counts = generate(fleet, [request(place, SLOW) for place in range(6)])
    assert {completion.finish_reason for answers in results.values() for completion in answers or []} == {"stop"}
    assert counts.finished == 6 and counts.retried >= 1 and counts.failed == 0


def test_worker_that_hangs_is_lost_and_gets_no_more_requests(
    make_fleet: MakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xrl.rollout.client.HEALTH_TIMEOUT_S", 1.0)
    fleet = make_fleet(2, rollout_timeout_s=1.0, rollout_max_batch_size=2, rollout_max_restarts=0)
    fleet.workers[0]._process.send_signal(signal.SIGSTOP)
    results, counts = generate(fleet, [request(place) for place in range(12)])
    assert all(results.values()) and counts.finished == 12
    assert fleet.num_lost == 1 and [worker.number for worker in fleet.ready()] == [1]


def test_end_of_the_last_worker_is_an_error_that_names_its_log(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1)
    with pytest.raises(WorkerGone, match="rollout_worker_0.log"):
        generate(fleet, [request(0, DIE), request(1, HANG)])


def test_worker_without_weights_refuses_to_generate(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1, update=False, rollout_max_retries=0)
    results, counts = generate(fleet, [request(0)])
    assert results == {0: None}
    assert counts.failed == 1


def test_refused_requests_do_not_count_as_running(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1, update=False, rollout_max_retries=0)
    generate(fleet, [request(0)])
    with urllib.request.urlopen(fleet.workers[0].url + protocol.HEALTH) as answer:
        assert json.load(answer)["num_running"] == 0


def test_every_update_takes_effect_on_every_worker(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2)
    publisher = WeightStream(fleet)
    for version in (1, 2, 3):
        report = publisher.publish(
            iter([bucket("layers.0", 1.0, version=version), bucket("final", float(version), size=5, version=version)]),
            version=version,
        )
        assert report.num_tensors == 2
        assert report.num_bytes == 4 * 8
        results, _ = generate(fleet, [request(place) for place in range(8)])
        for completions in results.values():
            assert completions is not None
            assert {completion.weights_version for completion in completions} == {version}
            assert completions[0].logprobs[0] == -(3.0 + 5.0 * version)


def test_refused_layer_is_named_with_the_worker(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1)
    with pytest.raises(RuntimeError, match=r"weights version 1, bad: rollout worker 0 \(.*wrong shape"):
        WeightStream(fleet).publish([bucket("bad", 1.0)], version=1)


def test_memory_for_weights_is_used_again(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1)
    publisher = WeightStream(fleet)
    sizes = set()
    for version in range(1, 20):
        publisher.publish([bucket(f"layers.{i}", 1.0, size=50_000) for i in range(3)], version=version)
        sizes.add(publisher._sender.num_bytes)
    assert len(sizes) == 1


def test_worker_that_died_during_an_update_is_left_out(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2)
    fleet.workers[1]._process.kill()
    fleet.workers[1]._process.wait()
    WeightStream(fleet).publish([bucket("layers.0", 2.0)], version=1)
    results, _ = generate(fleet, [request(place) for place in range(4)])
    assert all(results.values())


def test_a_process_that_takes_long_to_end_holds_nobody_up(
    make_fleet: MakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = make_fleet(2)
    victim = fleet.workers[0]
    may_end, restart = threading.Event(), victim.restart

    def restart_late() -> None:
        assert may_end.wait(60)
        restart()

    monkeypatch.setattr(victim, "restart", restart_late)
    fleet.roster.lose(victim, "it hangs")
    results, _ = generate(fleet, [request(place) for place in range(4)])
    assert all(results.values()) and [worker.number for worker in fleet.reachable()] == [1]
    may_end.set()
    WeightStream(fleet).publish([bucket("layers.0", 1.0)], version=1)
    assert fleet.num_restarted == 1


def test_closing_ends_what_is_about_to_be_started_again(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(1)
    fleet.roster.lose(fleet.workers[0], "it hangs")
    fleet.close()
    assert not fleet.workers[0].is_alive


def test_closing_ends_workers_at_once_even_while_they_generate(make_fleet: MakeFleet) -> None:
    fleet = make_fleet(2)
    stream = fleet.generate([request(0), request(1, HANG)], RolloutCounts())
    next(stream)
    fleet.close()
    assert not any(worker.is_alive for worker in fleet.workers)


@pytest.mark.parametrize("name", ["INT", "TERM", "USR1", "USR2"])
def test_what_a_terminal_or_a_scheduler_sends_to_all_processes_does_not_end_a_worker(
    make_fleet: MakeFleet, name: str
) -> None:
    fleet = make_fleet(1)
    subprocess.run(["kill", f"-{name}", str(fleet.workers[0]._process.pid)], check=True, timeout=60)
    results, counts = generate(fleet, [request(0)])
    assert results[0] and counts.retried == 0


def test_worker_gets_no_more_requests_at_once_than_it_takes(
    make_fleet: MakeFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = make_fleet(1)
    fleet.workers[0].max_requests = 3
    completions, at_once, most = fleet.client.completions, 0, 0

    async def counted(*arguments: Any, **options: Any) -> list[Completion]:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        try:
            return await completions(*arguments, **options)
        finally:
            at_once -= 1

    monkeypatch.setattr(fleet.client, "completions", counted)
    _, counts = generate(fleet, [request(place) for place in range(40)])
    assert counts == RolloutCounts(sent=40, finished=40)
    assert most == 3


def test_few_open_files_hold_requests_back_and_lose_none(tmp_path: Path) -> None:
    """A process of its own, whose hard limit no more than a hundred connections fit under."""
    program = f"""
import logging, pathlib
from tests.rollout.fleets import *
from xrl.config import RolloutConfig
from xrl.rollout.publish import WeightStream
from xrl.types import Completion
logging.basicConfig(level=logging.WARNING, format="%(message)s")
folder = pathlib.Path({str(tmp_path)!r})
settings = dict(model_dir=folder, dtype="float32", num_threads=1, max_model_len=64, vocab_size=9999, log_dir=folder)
with Fleet(RolloutConfig(engine=ENGINE), devices=["cpu"] * 2, **settings) as fleet:
    WeightStream(fleet).publish([bucket("layers.0", 1.0)], version=0)
    for _ in range(2):
        results, counts = generate(fleet, [request(place, num_samples=1) for place in range(1500)])
        print(len(results), counts.finished, counts.failed, counts.retried)
"""
    found = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200)),
    )
    assert found.stdout.split("\n")[:2] == ["1500 1500 0 0"] * 2, found.stderr[-2000:]
    assert found.stderr.count("limit of open files (200 of this process)") == 1
