"""Why a run learns nothing, in words."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from tests.metrics.learning_records import WORDS, flat, record, seen
from xrl.metrics.learning import RolloutRecord
from xrl.metrics.learning_words import LearningWords, no_stop_token, what_is_left
from xrl.metrics.run_folder import RunFolder


def third_warning(*records: RolloutRecord, words: LearningWords = WORDS) -> str:
    """What is said after three rollouts; one alone is repeated."""
    _, warnings = seen(records if len(records) > 1 else [*records] * 3, words=words)
    (sentence,) = warnings[-1]
    return sentence


def test_reward_that_never_differs_is_named_with_its_judge_and_where_to_look() -> None:
    assert third_warning(flat(0.0)) == (
        "nothing was learned from the last 3 rollouts: every one of 24 answers got reward 0: --judge mine.py:reward "
        "gives all answers the same reward, or the model gets no prompt right; see answers_3.jsonl"
    )
    assert "got reward -1: --judge mine.py:reward gives all" in third_warning(flat(-1.0))


def test_answers_that_are_all_right_leave_nothing_to_learn() -> None:
    said = third_warning(flat(1.0))
    assert "got reward 1: the model has nothing left to learn" in said
    assert "or --judge mine.py:reward takes every answer for right" in said


def test_answers_that_failed_are_not_counted_as_judged() -> None:
    assert "every one of 21 answers got reward 0" in third_warning(flat(num_failed=1))


def test_rewards_that_differ_only_between_groups_are_another_matter() -> None:
    said = third_warning(flat(0.5, reward_std=0.5))
    assert "in each of 12 groups all answers got the same reward, though not in all groups the same one" in said
    said = third_warning(flat(0.0), flat(1.0), flat(0.0))
    assert "though not in all groups the same one" in said


def test_weights_that_change_without_any_difference_of_rewards_are_said() -> None:
    said = third_warning(record(num_flat=4))
    assert "got the same reward" in said and "by the KL or the entropy term, weight decay or momentum alone" in said
    assert "weights change" not in third_warning(flat())


def test_answers_that_are_all_cut_off_are_said_beside_the_reward() -> None:
    said = third_warning(flat(truncated_fraction=1.0))
    assert "got reward 0" in said and "every answer was cut off at --max-response-length 32: raise it" in said
    assert "cut off" not in third_warning(flat(truncated_fraction=0.9))


def test_answers_that_cannot_end_are_not_helped_by_more_room() -> None:
    words = dataclasses.replace(WORDS, has_stop_tokens=False)
    said = third_warning(flat(truncated_fraction=1.0), words=words)
    assert "as no token ends an answer: name an eos_token_id" in said and "raise it" not in said


def test_answers_that_are_meant_to_run_to_the_limit_are_no_news() -> None:
    words = dataclasses.replace(WORDS, ignore_eos=True, has_stop_tokens=False)
    assert "cut off" not in third_warning(flat(truncated_fraction=1.0), words=words)
    assert seen([record(truncated_fraction=1.0)] * 5, words=words)[1] == [[]] * 5


def test_empty_answers_are_said_before_their_reward() -> None:
    said = third_warning(flat(num_empty=8))
    assert "all 24 answers are empty, with reward 0 from --judge mine.py:reward" in said and "chat template" in said
    nobodys = flat(num_empty=8, num_failed=8, num_too_small=4, reward_mean=math.nan, reward_std=math.nan)
    assert "all 24 answers are empty: " in third_warning(nobodys)


def test_groups_that_lost_their_answers_are_counted() -> None:
    lost = flat(num_failed=6, num_too_small=4, reward_mean=math.nan, reward_std=math.nan)
    assert "no group had two answers left to compare, as 18 of 24 answers failed" in third_warning(lost)


def test_learning_rate_0_is_named_with_its_flags() -> None:
    idle = record(lr=0.0, weights_changed=False)
    assert "the learning rate was 0 in all 3 updates: raise --lr" in third_warning(idle)
    verdict = seen([idle])[0].at_end()
    assert verdict is not None and verdict.sentence.startswith(
        "nothing was learned from rollout 1: the learning rate was 0 in its only update: raise --lr"
    )


def test_gradient_and_weights_have_sentences_of_their_own() -> None:
    assert "the gradient was exactly 0 in all 6 updates" in third_warning(record(grad_norm=0.0, num_updates=2))
    assert "not one weight changed in all 3 updates: lr 1e-06 is too small" in third_warning(
        record(weights_changed=False)
    )


def test_what_is_odd_though_something_is_learned_says_so() -> None:
    assert third_warning(record(truncated_fraction=1.0)) == (
        "every answer of the last 3 rollouts was cut off at --max-response-length 32: raise it; see answers_3.jsonl"
    )


def test_a_model_without_an_end_is_named() -> None:
    assert "no token ends an answer" in no_stop_token(Path("some/model")) and "some/model" in no_stop_token(
        Path("some/model")
    )


def test_end_says_which_weights_are_saved_where(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert what_is_left(folder, has_moved=False) == (
        f"run folder {tmp_path}, without a checkpoint, as the weights are still those of the start"
    )
    folder.checkpoint(5).mkdir()
    assert what_is_left(folder, has_moved=False).endswith("the weights are still those of the start, also in hf-5")
    folder.checkpoint(23).mkdir()
    assert what_is_left(folder, has_moved=True) == f"run folder {tmp_path}; the weights that it came to are in hf-23"
