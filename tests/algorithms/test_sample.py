"""Episodes become rows: what is trained, with which log-probs and versions, where turns follow each other and fork."""

from __future__ import annotations

import pytest

from tests.samples import answer, prompt
from xrl.algorithms.sample import sample_of, samples_of
from xrl.types import Completion, Episode, Sample, Turn, Verdict

PROMPT = prompt(5, 6)


def turn(
    completion: Completion, *, parent: int | None = None, context: tuple[int, ...] = (), temperature: float = 0.7
) -> Turn:
    return Turn(completion=completion, text="", parent=parent, context_ids=context, temperature=temperature)


def rows(*turns: Turn, advantage: float = 0.5) -> list[Sample]:
    episode = Episode(prompt=PROMPT, turns=turns, verdict=Verdict(reward=1.0), status="done")
    return samples_of(episode, advantage=advantage, group_id=3, episode_id=8)


def test_an_answer_is_one_row_of_the_prompt_and_its_tokens() -> None:
    (row,) = rows(turn(answer(7, 8, 2, version=4)))
    assert row.token_ids.tolist() == [5, 6, 7, 8, 2]
    assert row.trained.tolist() == [False, False, True, True, True]
    assert row.rollout_logprobs.tolist() == [0.0, 0.0, -7 / 16, -8 / 16, -2 / 16]
    assert row.advantages.tolist() == [0.0, 0.0, 0.5, 0.5, 0.5]
    assert row.versions.tolist() == [-1, -1, 4, 4, 4]
    assert (row.prompt_length, row.group_id, row.episode_id, row.temperature) == (2, 3, 8, 0.7)


def test_what_a_tool_has_said_is_between_two_turns_and_never_trained_on() -> None:
    (row,) = rows(turn(answer(7, 8, version=1)), turn(answer(9, 2, version=2), parent=0, context=(30, 31)))
    assert row.token_ids.tolist() == [5, 6, 7, 8, 30, 31, 9, 2]
    assert row.trained.tolist() == [False, False, True, True, False, False, True, True]
    assert row.versions.tolist() == [-1, -1, 1, 1, -1, -1, 2, 2]
    assert row.rollout_logprobs.tolist() == [0, 0, -7 / 16, -8 / 16, 0, 0, -9 / 16, -2 / 16]
    assert row.advantages.tolist() == [0, 0, 0.5, 0.5, 0, 0, 0.5, 0.5]


def test_a_turn_that_several_continue_is_trained_once() -> None:
    first, second = rows(turn(answer(7)), turn(answer(8), parent=0), turn(answer(9), parent=0, context=(30,)))
    assert (first.token_ids.tolist(), second.token_ids.tolist()) == ([5, 6, 7, 8], [5, 6, 7, 30, 9])
    assert first.trained.tolist() == [False, False, True, True]
    assert second.trained.tolist() == [False, False, False, False, True]
    assert second.rollout_logprobs.tolist() == [0, 0, -7 / 16, 0, -9 / 16]  # sampled all the same
    assert second.advantages.tolist() == [0, 0, 0, 0, 0.5]


def test_turns_that_follow_the_prompt_each_are_rows_of_their_own() -> None:
    first, second = rows(turn(answer(7)), turn(answer(8)))
    assert (first.token_ids.tolist(), second.token_ids.tolist()) == ([5, 6, 7], [5, 6, 8])


def test_every_sampled_token_is_trained_once_however_an_episode_forks() -> None:
    found = rows(*(turn(answer(10 + n), parent=None if n == 0 else (n - 1) // 2) for n in range(7)))
    trained = [token for row in found for token in row.token_ids[row.trained].tolist()]
    assert sorted(trained) == list(range(10, 17)) and len(found) == 4


def test_an_answer_of_several_versions_says_which_token_is_whose() -> None:
    (row,) = rows(turn(answer(7, 8, 2, version=1, parts=((0, 1), (1, 2)))))
    assert row.versions.tolist() == [-1, -1, 0, 1, 1]


@pytest.mark.parametrize("parent", [1, 2, -1])
def test_a_turn_that_continues_itself_or_a_later_one_is_refused(parent: int) -> None:
    with pytest.raises(ValueError, match=f"turn 1 continues turn {parent}, which does not come before it"):
        rows(turn(answer(7)), turn(answer(8), parent=parent), turn(answer(9), parent=1))


def test_an_answer_with_too_few_log_probs_is_refused() -> None:
    with pytest.raises(ValueError, match="an answer has 2 tokens and 1 log-probs"):
        sample_of([5], answer(7, 8, logprobs=[-1.0]), advantage=0.0, group_id=0, episode_id=0, temperature=1.0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_an_answer_that_was_drawn_greedily_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="training needs a temperature > 0"):
        rows(turn(answer(7), temperature=temperature))


def test_turns_of_two_temperatures_are_no_row() -> None:
    with pytest.raises(ValueError, match="turns of one row were drawn at temperatures 0.5 and 0.7"):
        rows(turn(answer(7)), turn(answer(8), parent=0, temperature=0.5))
