"""From prompts to judged groups: order, seeds, what is carried into the next rollout, judges that fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from tests.experience.askings import finished
from tests.rollout.scripted_workers import SPECIAL, WHY_FAILED, ScriptedWorkers, Words
from tests.samples import answer, completion_of, contents, prompt
from xrl.algorithms.advantages import group_advantages
from xrl.algorithms.scoring import is_comparable, score_groups
from xrl.experience.asking import Need
from xrl.experience.collect import Collected, Collector
from xrl.experience.experience import refuse_useless
from xrl.launch.exit import RunEnded
from xrl.launch.progress import Progress
from xrl.launch.stop import StopAsked, StopRequest
from xrl.rewards.judge import InlineJudge
from xrl.rollout.dispatch import RolloutCounts
from xrl.types import Completion, GenerateRequest, Prompt, SamplingParams, Verdict

NO_ANSWER = 80  # the first token of a prompt that no worker can answer
SAMPLING = SamplingParams(temperature=0.7, top_k=5, max_new_tokens=8, stop_token_ids=(SPECIAL,), seed=1234)


def echo(request: GenerateRequest) -> list[Completion] | None:
    """The prompt's tokens and the number of the sample."""
    if request.token_ids[0] == NO_ANSWER:
        return None
    return [answer(*request.token_ids, sample) for sample in range(request.num_samples)]


def cut_off(request: GenerateRequest) -> list[Completion]:
    """One token, and no more."""
    return [answer(40 + sample, reason="abort") for sample in range(request.num_samples)]


def nothing(_: GenerateRequest) -> list[Completion]:
    """It was never sent."""
    return []


def reward(response: str, _: Prompt) -> float:
    """An answer's number of tokens."""
    return float(len(response.split()))


def fails_in_a_third(response: str, prompt: Prompt) -> float:
    sample = int(response.split()[-1])
    return 1.0 / (sample % 3 - 1) if sample % 3 == 1 else float(sample % 2)


def collector(workers: ScriptedWorkers, judge: Any = reward, **options: Any) -> Collector:
    return Collector(workers, Words(), InlineJudge(judge, **options))  # type: ignore[arg-type]


def prompts(*first_tokens: int) -> list[Prompt]:
    return [prompt(token, id=number) for number, token in enumerate(first_tokens)]


def take(
    collector: Collector, asked: list[Prompt], *, seed: int = 1234, num_samples: int = 2, **ends: int
) -> Collected:
    sampling = dataclasses.replace(SAMPLING, seed=seed)
    return finished(
        collector.collect(asked, sampling=sampling, num_samples=num_samples, description="training samples", **ends)
    )


def first_tokens(found: Collected) -> list[int]:
    """Of the groups' prompts, which tell them apart."""
    return [group.episodes[0].prompt.token_ids[0] for group in found.groups]


def test_groups_stand_in_the_order_of_their_prompts_whichever_ends_first() -> None:
    found = take(collector(ScriptedWorkers(echo, order=lambda number: [2, 0, 3, 1])), prompts(11, 12, 13, 14))
    assert first_tokens(found) == [11, 12, 13, 14]
    for group, token in zip(found.groups, (11, 12, 13, 14), strict=True):
        assert [completion_of(each) for each in group.episodes] == [answer(token, 0), answer(token, 1)]


def test_each_group_of_a_stream_draws_by_a_seed_of_its_own() -> None:
    workers = ScriptedWorkers(echo)
    one = collector(workers)
    take(one, prompts(11, 12, 11))  # a batch that crosses an epoch may hold a prompt twice
    asked = one.collect(prompts(11), sampling=SAMPLING, num_samples=2, description="samples", first_ordinal=3)
    finished(asked)
    seeds = [[request.sampling.seed for request in rollout] for rollout in workers.asked]
    assert seeds == [[2839730841293823290, 2839730841293823291, 2839730841293823292], [2839730841293823293]]
    assert [request.id for rollout in workers.asked for request in rollout] == ["1-0", "1-1", "1-2", "2-0"]
    for request in workers.asked[0]:
        assert dataclasses.replace(request.sampling, seed=1234) == SAMPLING
        assert (request.num_samples, request.first_sample, request.num_drawn) == (2, 0, 0)


def test_prompts_that_failed_are_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    found = take(collector(ScriptedWorkers(echo)), prompts(11, NO_ANSWER, 13))
    assert first_tokens(found) == [11, 13]
    assert found.counts == RolloutCounts(sent=3, finished=2, failed=1)
    assert found.counts.why_failed == WHY_FAILED
    assert "training samples: sent 3, finished 2, failed 1, retried 0" in caplog.text


def test_tokens_of_all_answers_are_counted() -> None:
    assert take(collector(ScriptedWorkers(echo)), prompts(11, NO_ANSWER, 13)).num_tokens == 2 * 2 * 2


def test_an_answer_is_judged_as_text_without_special_tokens() -> None:
    heard = []

    def judge(response: str, asked: Prompt) -> float:
        heard.append((response, asked.id))
        return 0.25

    workers = ScriptedWorkers(lambda request: [answer(21, 22, SPECIAL)] * request.num_samples)
    (group,) = take(collector(workers, judge), prompts(11)).groups
    assert heard == [("21 22", 0)] * 2
    assert [(each.response, each.verdict) for each in group.episodes] == [("21 22", Verdict(reward=0.25))] * 2
    assert completion_of(group.episodes[0]).token_ids.tolist() == [21, 22, SPECIAL]


def test_an_answer_is_judged_while_others_are_still_sampled() -> None:
    events: list[str] = []

    def answers(request: GenerateRequest) -> list[Completion] | None:
        events.append(f"answer {request.token_ids[0]}")
        return echo(request)

    def judge(response: str, _: Prompt) -> float:
        events.append(f"judge {response}")
        return 0.0

    workers = ScriptedWorkers(answers, order=lambda number: [1, 0])
    take(collector(workers, judge), prompts(11, 12), num_samples=1)
    assert events == ["answer 12", "judge 12 0", "answer 11", "judge 11 0"]


def test_every_request_that_ends_and_every_verdict_is_progress() -> None:
    progress = Progress()
    one = Collector(ScriptedWorkers(echo), Words(), InlineJudge(reward), progress)  # type: ignore[arg-type]
    asked = prompts(11, NO_ANSWER, 13)
    finished(one.collect(asked, sampling=SAMPLING, num_samples=2, description="training samples"))
    assert progress.pieces == 3 + 4


def test_it_can_be_told_for_how_many_verdicts_a_rollout_waits() -> None:
    told: list[str] = []
    lates: list[Late] = []
    progress = Progress()

    class Slow(InlineJudge):
        """Has the verdict on the first of two answers when it is asked for it."""

        def submit(self, response: str, prompt: Prompt) -> Future[Verdict]:
            verdict: Future[Verdict] = super().submit(response, prompt)
            if response.endswith("1"):
                return verdict
            lates.append(Late())
            lates[-1].set_result(verdict.result())
            return lates[-1]

    class Late(Future[Verdict]):
        is_there = False

        def done(self) -> bool:
            return self.is_there

    def look() -> None:
        """Called again and again while the collector waits: one more verdict is there each time."""
        if "verdicts" in progress.waits_for():
            told.append(progress.waits_for())
            next(late for late in lates if not late.is_there).is_there = True

    one = Collector(ScriptedWorkers(echo), Words(), Slow(reward), progress)  # type: ignore[arg-type]
    finished(
        one.collect(
            prompts(11, 12), sampling=SAMPLING, num_samples=2, description="training samples", while_waiting=look
        )
    )
    assert told == ["2 verdicts, the longest for 0 s", "1 verdicts, the longest for 0 s"]
    assert progress.waits_for() == ""


def test_a_rollout_ends_when_enough_groups_are_whole_and_the_others_are_carried() -> None:
    workers = ScriptedWorkers(echo, after_cut=cut_off, order=lambda number: [2, 0, 3, 1])
    one = collector(workers)
    found = take(one, prompts(11, 12, 13, 14), enough=2)
    assert first_tokens(found) == [11, 13]
    assert (workers.num_cuts, one.num_carried) == (1, 2)
    assert found.counts == RolloutCounts(sent=4, finished=2, unfinished=2)


def test_without_enough_a_rollout_is_never_cut_short() -> None:
    workers = ScriptedWorkers(echo)
    take(collector(workers), prompts(11, 12))
    assert workers.num_cuts == 0


def test_carried_groups_come_first_and_go_on_from_the_tokens_they_have() -> None:
    workers = ScriptedWorkers(echo, after_cut=cut_off)
    one = collector(workers)
    take(one, prompts(11, 12), enough=1)
    workers.answers = lambda request: [answer(50, version=1)] * request.num_samples
    found = take(one, prompts(21), enough=2)
    requests = [(request.id, request.token_ids, request.num_samples) for request in workers.asked[1]]
    assert requests == [("2-0-0", [12, 40], 1), ("2-0-1", [12, 41], 1), ("2-1", [21], 2)]
    assert [request.sampling.max_new_tokens for request in workers.asked[1]] == [7, 7, 8]
    assert [(request.first_sample, request.num_drawn) for request in workers.asked[1]] == [(0, 1), (1, 1), (0, 0)]
    assert first_tokens(found) == [12, 21]
    assert [completion_of(each) for each in found.groups[0].episodes] == [
        answer(40, 50, version=1, parts=((0, 1), (1, 1))),
        answer(41, 50, version=1, parts=((0, 1), (1, 1))),
    ]
    assert [completion_of(each).parts for each in found.groups[1].episodes] == [(), ()]
    assert found.num_tokens == 2 * 2 + 2 * 1
    assert one.num_carried == 0


def test_a_group_that_was_never_sent_is_carried_as_a_new_one() -> None:
    workers = ScriptedWorkers(echo, after_cut=nothing)
    one = collector(workers)
    take(one, prompts(11, 12), enough=1)
    assert one.num_carried == 1
    take(one, [], enough=1)
    assert [(request.id, request.token_ids, request.num_samples) for request in workers.asked[1]] == [("2-0", [12], 2)]


def test_whole_answers_of_a_group_in_progress_are_not_asked_for_again() -> None:
    workers = ScriptedWorkers(echo, after_cut=lambda request: [answer(40), answer(41, reason="abort")])
    one = collector(workers)
    take(one, prompts(11, 12), enough=1)
    workers.answers = lambda request: [answer(50, version=1)]
    (group,) = take(one, [], enough=1).groups
    assert [request.id for request in workers.asked[1]] == ["2-0-1"]
    assert [completion_of(each) for each in group.episodes] == [
        answer(40),
        answer(41, 50, version=1, parts=((0, 1), (1, 1))),
    ]


def test_a_group_that_is_whole_too_late_is_the_first_of_the_next_rollout_and_judged_there() -> None:
    heard: list[str] = []
    workers = ScriptedWorkers(echo)

    def judge(response: str, _: Prompt) -> float:
        heard.append(response)
        return 0.0

    one = collector(workers, judge)
    take(one, prompts(11, 12), num_samples=1, enough=1)
    assert (heard, one.num_carried) == (["11 0"], 1)
    found = take(one, prompts(21, 22), num_samples=1, enough=2)
    assert [request.token_ids for request in workers.asked[1]] == [[21], [22]]
    assert (first_tokens(found), heard) == ([12, 21], ["11 0", "12 0", "21 0"])
    assert one.num_carried == 1  # the last one was whole too late again


def test_where_enough_carried_groups_are_whole_nobody_is_asked_and_the_rest_waits() -> None:
    workers = ScriptedWorkers(echo)
    one = collector(workers)
    take(one, prompts(11, 12, 13, 14), enough=1)
    found = take(one, prompts(21), enough=2)
    assert len(workers.asked) == 1, "nobody is asked"
    assert first_tokens(found) == [12, 13]
    assert found.counts == RolloutCounts()
    assert one.num_carried == 2  # the last whole one, and the new prompt
    assert first_tokens(take(one, [], enough=2)) == [14, 21]


def test_an_evaluation_in_between_leaves_carried_groups_alone() -> None:
    workers = ScriptedWorkers(echo, after_cut=cut_off)
    one = collector(workers)
    take(one, prompts(11, 12), enough=1)
    assert first_tokens(take(one, prompts(31, 32))) == [31, 32]
    assert one.num_carried == 1
    assert first_tokens(take(one, [], enough=1)) == [12]


def test_a_carried_group_of_which_one_answer_fails_for_good_is_dropped_whole() -> None:
    workers = ScriptedWorkers(echo, after_cut=cut_off)
    one = collector(workers)
    take(one, prompts(11, 12), enough=1)
    workers.answers = lambda request: None if request.id == "2-0-1" else echo(request)
    found = take(one, prompts(21), enough=2)
    assert first_tokens(found) == [21]
    assert found.counts == RolloutCounts(sent=3, finished=2, failed=1)
    assert one.num_carried == 0


def test_a_prompt_that_failed_is_not_carried() -> None:
    one = collector(ScriptedWorkers(echo, after_cut=cut_off))
    found = take(one, prompts(NO_ANSWER, 12, 13), enough=1)
    assert first_tokens(found) == [12]
    assert one.num_carried == 1


def test_where_no_worker_is_ready_weights_are_asked_for_and_the_rollout_goes_on() -> None:
    workers = ScriptedWorkers(echo)
    workers.num_lost = lambda request: 2 if request.token_ids == [12] else 0
    asking = collector(workers).collect(prompts(11, 12), sampling=SAMPLING, num_samples=2, description="samples")
    assert [next(asking), next(asking)] == [Need.WEIGHTS] * 2
    assert first_tokens(finished(asking)) == [11, 12]
    assert len(workers.asked) == 1


def answers_of(found: Collected) -> list[list[dict[str, Any]]]:
    return [[contents(completion_of(each)) for each in group.episodes] for group in found.groups]


def cut_off_at(times: int) -> Callable[[], None]:
    """Asks to stop at the `times`-th look."""
    looks = iter(range(1, times + 1))

    def look() -> None:
        if next(looks) == times:
            raise StopAsked("SIGUSR1")

    return look


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_rollout_that_is_cut_off_is_asked_again_just_as_it_was(times: int) -> None:
    def with_carried() -> tuple[ScriptedWorkers, Collector]:
        workers = ScriptedWorkers(echo, after_cut=cut_off)
        one = collector(workers)
        take(one, prompts(11, 12, 13), enough=1)
        workers.answers = lambda request: [answer(50, version=1)] * request.num_samples
        return workers, one

    workers, one = with_carried()
    call: dict[str, Any] = {"sampling": SAMPLING, "num_samples": 2, "description": "samples", "first_ordinal": 3}
    with pytest.raises(StopAsked):
        finished(one.collect(prompts(21), **call, enough=3, while_waiting=cut_off_at(times)))
    again = finished(one.collect(prompts(21), **call, enough=3))
    untouched_workers, untouched = with_carried()
    expected = finished(untouched.collect(prompts(21), **call, enough=3))
    assert answers_of(again) == answers_of(expected)
    asked, expected_asked = workers.asked[-1], untouched_workers.asked[-1]
    assert [dataclasses.replace(each, id="") for each in asked] == [
        dataclasses.replace(each, id="") for each in expected_asked
    ]


def test_verdicts_that_come_while_the_run_is_asked_to_stop_are_thrown_away() -> None:
    stop = StopRequest()

    def judge(response: str, _: Prompt) -> float:
        stop.ask("SIGTERM")
        raise RuntimeError("ended by SIGTERM")

    one = collector(ScriptedWorkers(echo), judge)
    with pytest.raises(StopAsked):
        finished(
            one.collect(prompts(11), sampling=SAMPLING, num_samples=1, description="samples", while_waiting=stop.check)
        )


def score(found: Collected) -> Any:
    return score_groups(
        found.groups,
        lambda rewards: group_advantages(rewards, normalize=False),
        keep=lambda group: is_comparable(group, filter_zero_variance=True),
    )


def collect(judge: Any, **options: Any) -> Collected:
    return take(collector(ScriptedWorkers(echo), judge, **options), prompts(11, 12), num_samples=6)


def test_answers_on_which_the_judge_failed_move_no_mean_and_are_not_trained_on() -> None:
    found = collect(fails_in_a_third)
    refuse_useless(1, found)
    # Of samples 0..5 the judge fails on 1 and 4; the others get 0, 0, 1, 1.
    assert [episode.verdict.reward for episode in found.groups[0].episodes] == [0.0, None, 0.0, 1.0, None, 1.0]
    scored = score(found)
    assert scored.advantages == [[-0.5, None, -0.5, 0.5, None, 0.5]] * 2
    assert (scored.metrics["reward/mean"], scored.metrics["pass_fraction"]) == (0.5, 0.5)
    assert (scored.metrics["samples/judge_failed"], scored.metrics["samples/trained"]) == (4, 8)


def test_zero_for_a_failed_judge_is_trained_on() -> None:
    scored = score(collect(fails_in_a_third, failed_reward=0.0))
    assert scored.metrics["reward/mean"] == pytest.approx(1 / 3)
    assert (scored.metrics["samples/judge_failed"], scored.metrics["samples/trained"]) == (4, 12)


def test_run_ends_where_the_judge_fails_on_more_than_half_and_names_the_line() -> None:
    def fails_mostly(response: str, prompt: Prompt) -> float:
        return {"0": 1.0, "1": 0.0}[response.split()[-1]]

    line = fails_mostly.__code__.co_firstlineno + 1
    with pytest.raises(RunEnded) as caught:
        refuse_useless(3, collect(fails_mostly))
    sentence = caught.value.sentence
    assert sentence.startswith("rollout 3: the judge failed on 8 of 12 answers, first with KeyError: '2' (")
    assert sentence.endswith(f"test_collect.py, line {line}, in fails_mostly)")
    # Asked to take them for wrong answers, it goes on while any answer is judged.
    refuse_useless(3, collect(fails_mostly, failed_reward=0.0))


def test_run_ends_where_every_prompt_failed_and_says_why_the_first_did() -> None:
    found = take(collector(ScriptedWorkers(echo)), prompts(NO_ANSWER, NO_ANSWER))
    with pytest.raises(RunEnded) as caught:
        refuse_useless(3, found)
    assert caught.value.sentence == (
        "rollout 3: all of its prompts failed, the first with rollout worker 0 (10.0.0.2:80): out of memory"
    )


def growing(request: GenerateRequest) -> list[Completion]:
    """Answers of as many tokens as their prompt's first token says, tens apart; what is asked for at most."""
    length, num_drawn = request.token_ids[0] % 10, request.num_drawn
    left = length - num_drawn
    most = request.sampling.max_new_tokens
    tokens = [40 + num_drawn + index for index in range(min(left, most))]
    return [answer(*tokens, reason="stop" if left <= most else "length") for _ in range(request.num_samples)]


@pytest.mark.parametrize("step", [1, -1])
def test_with_counts_the_first_whole_groups_are_taken_whichever_end_first(step: int) -> None:
    workers = ScriptedWorkers(growing, order=lambda number: list(range(number))[::step])
    one = collector(workers)
    asked = {"enough": 2, "most_tokens": 2}
    found = take(one, prompts(17, 12, 15, 14), **asked)
    # After 2 tokens one group is whole, after 4 there are two: by then 15 has 4 tokens, and 17 too.
    assert first_tokens(found) == [12, 14]
    assert [len(group.answers[0].token_ids) for group in one._carried] == [4, 4]
    assert found.counts.unfinished == 2
    assert workers.num_cuts == 0
    found = take(one, prompts(11, 11), **asked)
    # 15 is whole first by its place; one of the new groups is whole too, and judged in this rollout.
    assert first_tokens(found) == [15, 11]
    found = take(one, prompts(13), **asked)
    assert first_tokens(found) == [17, 11]
