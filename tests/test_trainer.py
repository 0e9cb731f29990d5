"""The loop and one step of it, on one rank: who is asked what, in which order, and what is told of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import ProcessGroup

from tests.ranks import world_of_one
from tests.samples import answer, contents, group, judged, prompt, sample
from xrl.parallel.cpu import prepare_megatron_for_cpu

prepare_megatron_for_cpu()

from tests.trainer_parts import SAMPLING, Run, flat, published, report, saved  # noqa: E402
from xrl.launch.exit import RunEnded, RunFailed  # noqa: E402
from xrl.launch.progress import PhaseKind, Progress  # noqa: E402
from xrl.rollout.dispatch import RolloutCounts  # noqa: E402
from xrl.rollout.process import WorkerGone  # noqa: E402
from xrl.types import Group  # noqa: E402

MakeRun = Callable[..., Run]
CANARY = ["ask the canary", "score 1 canaries", "judge the canary"]
# Seconds, and what depends on them; memory.
MEASURED = ("seconds/publish", "step_seconds", "tokens_per_s", "memory_gb")


@pytest.fixture(scope="module")
def world() -> Iterator[ProcessGroup]:
    with world_of_one() as found:
        yield found


@pytest.fixture
def make_run(tmp_path: Path, world: ProcessGroup) -> MakeRun:
    return lambda **options: Run(tmp_path, control=world, **options)


def step(index: int, *, canary: bool = False) -> list[str]:
    """The log of a rollout and its update."""
    return [
        *(f"take {index}", f"write answers {index}", "learn from 4", f"judge mismatch 0.125 of {index}"),
        *published(index),
        *(CANARY if canary else []),
        f"report {index}",
    ]


def test_a_run_takes_learns_publishes_and_reports_and_evaluates_and_saves_in_between(make_run: MakeRun) -> None:
    run = make_run(has_canary=True, eval_interval=2)
    run.rates = {"eval/pass@1": 0.5}
    run.checkpoints.due = {1, 3, 4}
    run.train(4)
    assert run.log == [
        *(*published(0), *CANARY, "evaluate"),
        *(*step(1, canary=True), *saved("hf-1", num_rollouts=4)),
        *(*step(2, canary=True), "evaluate"),
        *(*step(3, canary=True), *saved("hf-3", num_rollouts=4)),
        *step(4, canary=True),
        *(*saved("hf-final", num_rollouts=4), "evaluate", "finish"),
    ]
    assert run.journal.evaluations == {index: {"eval/pass@1": 0.5} for index in (0, 2, 4)}
    assert run.journal.said == [f"saved {run.journal.folder.path / name}" for name in ("hf-1", "hf-3", "hf-final")]


def test_a_run_goes_on_behind_the_step_that_an_earlier_attempt_has_come_to(make_run: MakeRun) -> None:
    run = make_run(eval_interval=2)
    run.rates = {"eval/pass@1": 0.5}
    run.train(4, first_step=2)
    expected = [*published(2), *step(3), *step(4), *saved("hf-final", num_rollouts=4), "evaluate", "finish"]
    # The collector here counts by itself how often it is asked.
    assert [line for line in run.log if "take" not in line] == [line for line in expected if "take" not in line]


def test_a_run_that_has_learned_from_all_its_rollouts_and_has_no_model_yet_saves_it(make_run: MakeRun) -> None:
    run = make_run()
    run.train(4, first_step=4)
    assert run.log == [*published(4), *saved("hf-final", num_rollouts=4), "finish"]


@pytest.mark.parametrize(
    ("interval", "num_rollouts", "expected"), [(None, 3, [0, 3]), (2, 5, [0, 2, 4, 5]), (1, 2, [0, 1, 2])]
)
def test_held_out_prompts_are_asked_before_and_after_training_and_at_each_interval(
    make_run: MakeRun, interval: int | None, num_rollouts: int, expected: list[int]
) -> None:
    run = make_run(eval_interval=interval)
    run.rates = {"eval/pass@1": 0.5}
    run.train(num_rollouts)
    assert list(run.journal.evaluations) == expected
    assert run.log.count("evaluate") == len(expected)


def test_without_held_out_prompts_nobody_is_told_of_an_evaluation(make_run: MakeRun) -> None:
    run = make_run()
    run.train()
    assert run.journal.evaluations == {} and "evaluate" not in run.log


def test_what_a_rank_is_at_can_be_read_while_it_is(make_run: MakeRun) -> None:
    phases: list[str] = []
    kinds: list[PhaseKind] = []

    class Recording(Progress):
        def enter(self, phase: str, kind: PhaseKind) -> None:
            phases.append(phase)
            kinds.append(kind)

    run = make_run()
    run.progress = Recording()
    run.train()
    assert phases == [
        *("weights version 0 to the engines", "evaluation after rollout 0", "rollout 1", "update 1"),
        *("weights version 1 to the engines", "saving hf-final", "evaluation after rollout 1"),
    ]
    assert kinds == ["publish", "evaluation", "rollout", "update", "publish", "save", "evaluation"]
    assert run.progress.pieces == 3 * 3  # the buckets of two publications and of a checkpoint


def test_each_rollout_asks_for_a_batch_of_prompts_that_follow_in_the_stream(make_run: MakeRun) -> None:
    run = make_run()
    run.train(2)
    assert len(run.collector.calls) == 2
    for prompts, call in run.collector.calls:
        assert [each.id for each in prompts] == [0, 1]
        assert call == {
            "sampling": dataclasses.replace(SAMPLING, seed=1001),
            "num_samples": 2,
            "description": "training samples",
            "first_ordinal": 7,
            "enough": None,
            "most_tokens": None,
            "while_waiting": run.stop.check,
        }


@pytest.mark.parametrize(("num_carried", "num_prompts"), [(0, 3), (1, 2), (3, 0), (5, 0)])
def test_partial_rollouts_fill_up_what_is_carried_and_end_with_a_batch(
    make_run: MakeRun, num_carried: int, num_prompts: int
) -> None:
    run = make_run(num_in_flight=3, enough=2)
    run.collector.num_carried = num_carried
    run.train()
    ((prompts, call),) = run.collector.calls
    assert (len(prompts), call["enough"]) == (num_prompts, 2)


def test_the_actor_learns_what_the_algorithm_makes_of_the_answers(make_run: MakeRun) -> None:
    run = make_run()
    run.train()
    ((samples, algorithm),) = run.actor.updates
    scored = run.algorithm.score(run.collector.groups(1))
    assert list(map(contents, samples)) == list(map(contents, scored.samples)) and len(samples) == 4
    assert algorithm is run.algorithm
    assert run.journal.rollouts == [(1, run.collector.groups(1), scored.advantages, 4, scored.metrics)]


def test_one_row_says_everything_of_a_rollout_and_its_update(make_run: MakeRun) -> None:
    run = make_run()
    asked = prompt(5, 6)
    answers = [
        judged(asked, answer(3, 2, version=1, parts=((0, 1), (1, 1))), 1.0),
        judged(asked, answer(reason="length"), 0.0),
        judged(asked, answer(4, 2), None, error="KeyError: 'x'"),
        judged(asked, answer(4, 5, reason="length"), 0.0),
    ]
    run.collector.groups = lambda _: [Group(episodes=tuple(answers))]
    run.collector.counts = RolloutCounts(sent=9, finished=5, failed=1, retried=2, stale=3, unfinished=4)
    run.fleet.num_lost, run.fleet.num_restarted = 2, 1
    run.train()
    row = run.journal.rows[1]
    measured = {name: row.pop(name) for name in MEASURED}
    assert row == {
        **run.algorithm.score(run.collector.groups(1)).metrics,
        "prompts/failed": 1.0,
        "prompts/retried": 2.0,
        "prompts/unfinished": 4.0,
        "prompts/stale": 3.0,
        "samples/total": 4.0,
        "samples/empty": 1.0,
        "samples/continued": 1.0,
        "epoch": 2.0,
        "response_tokens": 8.0,
        "tokens_per_s/rollout": 2.0,
        "seconds/rollout": 4.0,
        "sync/gigabytes": 3.0,
        "sync/layers": 3.0,
        "sync/resent": 1.0,
        "workers/updated": 2.0,
        "loss": 0.25,
        "mismatch": 0.125,
        "mismatch_kl": 0.0625,
        "grad_norm": 0.5,
        "lr": 1e-6,
        "train_tokens": 40.0,
        "computed_tokens": 30.0,
        "updates": 1.0,
        "workers/lost": 2.0,
        "workers/restarted": 1.0,
        "seconds/logprobs": 0.5,
        "seconds/update": 1.5,
    }
    assert measured["tokens_per_s"] == 8.0 / measured["step_seconds"]
    assert 0 < measured["seconds/publish"] < measured["step_seconds"]
    assert measured["memory_gb"] > 0
    assert run.journal.updates[1] == []


def test_several_updates_are_one_row_and_a_line_each(make_run: MakeRun) -> None:
    run = make_run()
    run.actor.reports = lambda _: [report(), report(loss=1.25, mismatch=9.0, count=3.0, grad_norm=1.5, lr=2e-6)]
    run.train(2)
    row = run.journal.rows[1]
    assert row["loss"] == 1.0  # a mean over the tokens of both
    assert (row["mismatch"], row["mismatch_kl"]) == (0.125, 0.0625)  # of the weights that sampled
    assert (row["grad_norm"], row["lr"], row["updates"]) == (1.0, 2e-6, 2.0)
    assert (row["train_tokens"], row["computed_tokens"]) == (80.0, 60.0)
    first = {"loss": 0.25, "mismatch": 0.125, "mismatch_kl": 0.0625, "grad_norm": 0.5, "lr": 1e-6}
    second = {"loss": 1.25, "mismatch": 9.0, "mismatch_kl": 4.5, "grad_norm": 1.5, "lr": 2e-6}
    assert run.journal.updates[1] == [first, second]
    assert run.journal.first_updates == [first]  # explained once
    assert "judge mismatch 0.125 of 1" in run.log and "judge mismatch 9.0 of 1" not in run.log


def test_a_rollout_that_teaches_nothing_makes_no_update_and_is_reported(make_run: MakeRun) -> None:
    run = make_run()
    run.collector.groups = lambda number: flat(number) if number == 1 else [group(1.0, 0.0), group(0.0, 1.0)]
    run.train(2)
    row = run.journal.rows[1]
    assert row["updates"] == 0.0 and row["groups/flat"] == 2.0
    assert not {"loss", "mismatch", "grad_norm", "lr", "train_tokens"} & row.keys()
    assert run.log[2:7] == ["take 1", "write answers 1", "learn from 0", *published(1)]
    assert len(run.journal.first_updates) == 1  # the second rollout's


def test_weights_of_an_update_on_foreign_answers_reach_nobody(make_run: MakeRun) -> None:
    def judge(_: float) -> None:
        raise RunFailed("what the actor computes has not sampled them")

    run = make_run()
    run.judge_mismatch = judge
    with pytest.raises(RunFailed):
        run.train()
    assert run.log == [*published(0), *step(1)[:4]]


def test_weights_of_an_update_that_is_no_number_reach_nobody(make_run: MakeRun) -> None:
    def update(_: int) -> list[Any]:
        raise RuntimeError("the update's loss is nan")

    run = make_run()
    run.actor.reports = update
    with pytest.raises(RuntimeError, match="loss is nan"):
        run.train()
    assert run.log == [*published(0), *step(1)[:3]]


def test_a_rollout_without_answers_ends_the_run_before_anything_is_learned(make_run: MakeRun) -> None:
    run = make_run()
    run.collector.groups = lambda _: []
    run.collector.counts = RolloutCounts(sent=2, failed=2, why_failed="rollout worker 0: out of memory")
    with pytest.raises(RunEnded) as caught:
        run.train()
    assert caught.value.sentence == (
        "rollout 1: all of its prompts failed, the first with rollout worker 0: out of memory"
    )
    assert run.log == [*published(0), "take 1"]


def test_after_each_update_the_actor_scores_what_the_engines_sample(make_run: MakeRun) -> None:
    run = make_run(has_canary=True)
    run.canary.samples = [sample([1], [3]), sample([1], [4])]
    run.actor.differences = [0.25, 0.75]
    run.train()
    assert run.actor.scored == [run.canary.samples] * 2
    assert run.canary.judged == [[0.25, 0.75]] * 2
    assert run.journal.rows[1]["canary"] == 0.75
    assert run.journal.rows[1]["seconds/canary"] > 0


def test_without_a_canary_nothing_is_said_of_it(make_run: MakeRun) -> None:
    run = make_run()
    run.train()
    assert not {"canary", "seconds/canary"} & run.journal.rows[1].keys()


def test_a_canary_that_nobody_answered_is_not_judged(make_run: MakeRun) -> None:
    run = make_run(has_canary=True)
    run.canary.samples = []
    run.train()
    assert run.canary.judged == [] and "canary" not in run.journal.rows[1]


def test_weights_whose_workers_were_all_lost_are_published_anew(
    make_run: MakeRun, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(max_repeats=2)
    run.stream.is_lost = lambda number: number <= 2
    run.fleet.num_ready = lambda: int(run.stream.num_calls > 2)
    run.train()
    lost = ["publish 0: lost", "weights 0 are out"]  # other ranks take part in every bucket
    assert run.log[:7] == [*lost, *lost, *published(0), "take 1"]
    assert caplog.text.count("weights version 0 have no rollout worker any more: they are published anew") == 2


def test_workers_that_are_lost_after_the_update_get_it_anew(make_run: MakeRun) -> None:
    run = make_run(has_canary=True)
    run.fleet.num_ready = lambda: int(run.stream.num_calls != 1)
    run.train()
    assert run.log[:11] == [*published(0), *CANARY, *published(0), *CANARY, "take 1"]


@pytest.mark.parametrize("num_restarts", [0, 2])
def test_weights_are_published_as_often_as_a_worker_is_started_again(make_run: MakeRun, num_restarts: int) -> None:
    run = make_run(max_repeats=num_restarts)
    run.fleet.num_ready = lambda: 0
    with pytest.raises(WorkerGone, match="no rollout worker is left"):
        run.train()
    assert run.log == published(0) * (1 + num_restarts)


def test_a_rollout_whose_workers_are_lost_has_its_weights_published_once_more(make_run: MakeRun) -> None:
    run = make_run()
    run.collector.num_lost = lambda number: int(number == 2)
    run.train(2)
    assert run.log[:-3] == [*published(0), *step(1), "take 2", *published(1), *step(2)[1:]]


def test_actor_and_engines_on_the_same_devices_take_turns(make_run: MakeRun) -> None:
    run = make_run(colocate=True)
    run.train()
    actor_gives = ["actor leaves the device", "engines sleep"]
    engines_give = ["engines sleep", "actor takes the device"]
    assert run.log[:-3] == [
        *(*actor_gives, *published(0), "engines wake"),
        *("take 1", "write answers 1", *engines_give, "learn from 4", "judge mismatch 0.125 of 1"),
        *(*actor_gives, *published(1), "engines wake"),
        "report 1",
    ]
    assert run.journal.rows[1]["seconds/turns"] > 0


def test_on_devices_of_their_own_nobody_leaves(make_run: MakeRun) -> None:
    run = make_run()
    run.train()
    assert not any("device" in line or "engines" in line for line in run.log)
    assert "seconds/turns" not in run.journal.rows[1]


def test_workers_of_this_host_read_weights_where_the_ranks_write_them(make_run: MakeRun) -> None:
    run = make_run()
    run.train()
    assert run.actor.memories == [run.stream.memory] * 2


def test_an_algorithm_need_not_report_how_far_answers_are_from_the_actor(make_run: MakeRun) -> None:
    run = make_run()
    update = report()
    only_loss = {"loss": update.metrics["loss"]}
    run.actor.reports = lambda _: [dataclasses.replace(update, metrics=only_loss)]
    run.train()
    assert run.journal.rows[1]["loss"] == 0.25 and "mismatch" not in run.journal.rows[1]
    assert not any(line.startswith("judge mismatch") for line in run.log)
