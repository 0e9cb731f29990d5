"""What a group in progress asks for, and what it makes of what comes back."""

from __future__ import annotations

import dataclasses
import json

import pytest

from tests.samples import answer, contents, prompt
from xrl.experience.partial import GroupInProgress, groups_of_state, groups_state, joined
from xrl.types import GenerateRequest, SamplingParams

SAMPLING = SamplingParams(temperature=0.7, top_k=5, top_p=0.9, max_new_tokens=8, stop_token_ids=(2,), seed=1000)
OWN_SAMPLING = dataclasses.replace(SAMPLING, seed=1000 * 0x9E3779B97F4A7C15 % 2**63 + 3)  # of the group 3
PROMPT = prompt(7, 8, 9)


def started(*answers) -> GroupInProgress:
    return GroupInProgress(prompt=PROMPT, ordinal=3, answers=list(answers))


def test_a_new_group_asks_for_all_its_answers_at_once() -> None:
    group = started()
    assert group.requests(SAMPLING, 4, "1234-0") == [
        GenerateRequest(id="1234-0", token_ids=[7, 8, 9], num_samples=4, sampling=OWN_SAMPLING)
    ]
    assert group.places(4) == [[0, 1, 2, 3]]


def test_a_cut_off_answer_goes_on_behind_its_own_tokens_for_what_is_left_of_its_length() -> None:
    group = started(answer(4, 2), answer(4, 5, 6, reason="abort"), answer(5, 2), answer(6, reason="abort"))
    first, second = group.requests(SAMPLING, 4, "1234-0")
    assert group.places(4) == [[1], [3]]
    assert (first.id, second.id) == ("1234-0-1", "1234-0-3")
    assert (first.token_ids, second.token_ids) == ([7, 8, 9, 4, 5, 6], [7, 8, 9, 6])
    assert (first.num_samples, second.num_samples) == (1, 1)
    assert (first.sampling.max_new_tokens, second.sampling.max_new_tokens) == (5, 7)
    assert (first.first_sample, second.first_sample) == (1, 3)
    assert (first.num_drawn, second.num_drawn) == (3, 1)
    for request in (first, second):  # as before in everything else, the seed too: it draws what it would have drawn
        assert dataclasses.replace(request.sampling, max_new_tokens=8) == OWN_SAMPLING


def test_an_answer_that_was_cut_off_before_its_first_token_starts_from_the_prompt() -> None:
    (request,) = started(answer(4, 2), answer(reason="abort")).requests(SAMPLING, 2, "1234-0")
    assert (request.id, request.token_ids, request.sampling.max_new_tokens) == ("1234-0-1", [7, 8, 9], 8)


def test_an_answer_that_was_cut_off_one_token_short_asks_for_that_token() -> None:
    (request,) = started(answer(*range(3, 10), reason="abort")).requests(SAMPLING, 1, "1234-0")
    assert request.sampling.max_new_tokens == 1


@pytest.mark.parametrize("seed", [0, 2**63 - 1, -(2**62)])
@pytest.mark.parametrize("ordinal", [0, 10**9])
def test_seeds_are_numbers_that_every_engine_takes(seed: int, ordinal: int) -> None:
    group = GroupInProgress(prompt=PROMPT, ordinal=ordinal)
    (request,) = group.requests(dataclasses.replace(SAMPLING, seed=seed), 64, "1234-0")
    assert 0 <= request.sampling.seed < 2**63


def test_answers_are_kept_as_they_came() -> None:
    group = started()
    answers = [answer(4, 2), answer(4, 5, reason="abort", version=3)]
    group.take([0, 1], answers)
    assert group.answers == answers
    assert not group.is_whole


def test_a_continuation_is_joined_to_the_answer_it_is_of_and_to_no_other() -> None:
    group = started(answer(4, 2), answer(4, 5, reason="abort"), answer(6, reason="abort"))
    group.take([2], [answer(9, 2, version=1)])
    assert group.answers == [
        answer(4, 2),
        answer(4, 5, reason="abort"),
        answer(6, 9, 2, version=1, parts=((0, 1), (1, 2))),
    ]
    assert not group.is_whole
    group.take([1], [answer(6, 7, reason="length", version=1)])
    assert group.answers[1] == answer(4, 5, 6, 7, reason="length", version=1, parts=((0, 2), (1, 2)))
    assert group.is_whole


def test_each_token_keeps_the_log_prob_and_the_version_it_was_sampled_with() -> None:
    first = answer(4, 5, reason="abort", logprobs=[-0.5, -0.25], version=3)
    second = answer(6, reason="abort", logprobs=[-2.0], version=4)
    third = answer(7, 8, 2, logprobs=[-1.0, -3.0, -0.125], version=6)
    found = joined(joined(first, second), third)
    assert found.token_ids.tolist() == [4, 5, 6, 7, 8, 2]
    assert found.logprobs.tolist() == [-0.5, -0.25, -2.0, -1.0, -3.0, -0.125]
    assert found.parts == ((3, 2), (4, 1), (6, 3))
    assert (found.finish_reason, found.weights_version) == ("stop", 6)


def test_a_part_without_tokens_is_none() -> None:
    nothing = answer(reason="abort", version=3)
    assert joined(nothing, answer(4, 2, version=4)).parts == ((4, 2),)
    assert joined(answer(4, reason="abort", version=2), nothing).parts == ((2, 1),)
    assert joined(nothing, nothing).parts == ()


def test_two_parts_of_one_version_stay_two() -> None:
    found = joined(answer(4, reason="abort", version=3), answer(5, 2, version=3))
    assert found.parts == ((3, 1), (3, 2))


def test_an_answer_of_one_piece_names_no_parts() -> None:
    group = started()
    group.take([0], [answer(4, 2, version=5)])
    assert (group.answers[0].parts, group.answers[0].weights_version) == ((), 5)


@pytest.mark.parametrize(("reason", "expected"), [("stop", True), ("length", True), ("abort", False), ("error", False)])
def test_an_answer_is_whole_that_ended_by_itself_or_at_its_longest(reason, expected: bool) -> None:
    assert answer(4, reason=reason).is_whole is expected
    assert started(answer(5, 2), answer(4, reason=reason)).is_whole is expected


def test_a_group_without_answers_is_not_whole() -> None:
    assert not started().is_whole


def test_a_continuation_that_is_the_stop_token_alone_ends_the_answer() -> None:
    group = started(answer(*range(3, 10), reason="abort"))
    group.take([0], [answer(2, version=1)])
    assert group.is_whole
    assert group.answers == [answer(*range(3, 10), 2, version=1, parts=((0, 7), (1, 1)))]


def test_a_continuation_may_be_cut_off_again_and_then_asks_for_less() -> None:
    group = started(answer(3, 4, reason="abort"))
    group.take([0], [answer(5, 6, 7, reason="abort", version=1)])
    (request,) = group.requests(SAMPLING, 1, "1235-0")
    assert (request.token_ids, request.sampling.max_new_tokens) == ([7, 8, 9, 3, 4, 5, 6, 7], 3)
    group.take([0], [answer(8, 9, 10, reason="length", version=2)])
    assert group.is_whole and len(group.answers[0].token_ids) == SAMPLING.max_new_tokens
    assert group.answers[0].parts == ((0, 2), (1, 3), (2, 3))


def test_an_answer_grows_by_so_many_tokens_at_most_and_by_no_more_than_are_left_of_its_length() -> None:
    (request,) = started().requests(SAMPLING, 2, "1234-0", most_tokens=3)
    assert request.sampling.max_new_tokens == 3
    short, long = started(answer(4, reason="abort"), answer(*range(3, 9), reason="abort")).requests(
        SAMPLING, 2, "1234-0", most_tokens=3
    )
    assert (short.sampling.max_new_tokens, long.sampling.max_new_tokens) == (3, 2)


def test_an_answer_that_ends_where_it_was_told_to_has_not_ended() -> None:
    group = started()
    group.take([0, 1], [answer(4, 5, 6, reason="length"), answer(4, 2)], longest=8)
    assert [each.finish_reason for each in group.answers] == ["abort", "stop"]
    group.take([0], [answer(7, 8, 9, reason="length", version=1)], longest=8)
    assert not group.is_whole
    group.take([0], [answer(3, 4, reason="length", version=2)], longest=8)
    assert group.is_whole
    assert group.answers[0].token_ids.tolist() == [4, 5, 6, 7, 8, 9, 3, 4]
    assert group.answers[0].parts == ((0, 3), (1, 3), (2, 2))


def test_groups_in_progress_come_back_from_their_state() -> None:
    groups = [started(answer(4, 2), answer(4, 5, reason="abort", version=3, parts=((1, 1), (3, 1)))), started()]
    groups[1].ordinal = 7
    state = groups_state(groups)
    arrays = {name: state.pop(name) for name in ("token_ids", "logprobs")}
    told = json.loads(json.dumps(state))
    found = groups_of_state({**told, **arrays}, lambda ordinal: PROMPT)
    assert [group.ordinal for group in found] == [3, 7]
    for before, after in zip(groups, found, strict=True):
        assert before.requests(SAMPLING, 2, "x") == after.requests(SAMPLING, 2, "x")
        for one, other in zip(before.answers, after.answers, strict=True):
            assert contents(one) == contents(other)


def test_no_groups_have_a_state_too() -> None:
    assert groups_of_state(groups_state([]), lambda ordinal: PROMPT) == []
