"""Trajectory files."""

from __future__ import annotations

import json
import math

import pytest

from tests.samples import answer
from xrl.metrics.trajectory import read_trajectory, write_trajectory
from xrl.types import Episode, Group, Prompt, Verdict


def group(*rewards, response="2\n#### 2", finish_reason="stop", judge_error=""):
    prompt = Prompt(id=11, token_ids=[1, 2, 3], text="1+1?", ground_truth="2", data_source="openai/gsm8k")
    completion = answer(5, 6, reason=finish_reason, version=4)
    failure, _, detail = judge_error.partition(": ")
    return Group(
        episodes=tuple(
            Episode.of_answer(
                prompt, completion, response, Verdict(reward=reward, failure=failure, detail=detail), temperature=1.0
            )
            for reward in rewards
        )
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rollout_idx_7_trajectory.jsonl"


def test_every_line_is_an_object_with_the_summary_first(path):
    groups = [group(1.0, 0.0), group(0.0)]
    write_trajectory(path, groups, rollout_id=7, metrics={"reward/mean": 1 / 3, "reward/std": math.nan})
    lines = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    assert lines[0] == {
        "rollout_id": 7,
        "task_name": "train",
        "num_groups": 2,
        "num_samples": 3,
        "num_tokens": 6,
        "weights_versions": [4],
        "reward/mean": 1 / 3,
        "reward/std": None,
    }
    assert [(line["group_id"], line["reward"]) for line in lines[1:]] == [(0, 1.0), (0, 0.0), (1, 0.0)]


def test_a_sample_says_what_was_asked_answered_and_judged(path):
    write_trajectory(path, [group(1.0)], rollout_id=7, advantages=[[0.5]], task_name="eval")
    _, samples = read_trajectory(path)
    assert samples == [
        {
            "rollout_id": 7,
            "group_id": 0,
            "task_name": "eval",
            "prompt_id": 11,
            "data_source": "openai/gsm8k",
            "status": "completed",
            "finish_reason": "stop",
            "error_msg": "",
            "prompt": "1+1?",
            "label": "2",
            "response": "2\n#### 2",
            "reward": 1.0,
            "prompt_len": 3,
            "response_len": 2,
            "weights_version": 4,
            "advantage": 0.5,
        }
    ]


@pytest.mark.parametrize(
    ("finish_reason", "status"),
    [("stop", "completed"), ("length", "completed"), ("abort", "aborted"), ("error", "failed")],
)
def test_status_follows_how_the_answer_ended(path, finish_reason, status):
    write_trajectory(path, [group(0.0, finish_reason=finish_reason)], rollout_id=7)
    assert read_trajectory(path)[1][0]["status"] == status


def test_a_failed_judge_and_a_reward_that_is_no_number_are_said(path):
    error = "KeyError: 'x' (mine.py, line 3, in reward)"
    write_trajectory(path, [group(None, math.nan, judge_error=error)], rollout_id=7, advantages=[[None, None]])
    for sample in read_trajectory(path)[1]:
        assert sample["reward"] is None
        assert sample["advantage"] is None
        assert sample["error_msg"] == f"the judge failed: {error}"


@pytest.mark.parametrize(
    "response", ["čtyři 四 😀", "line\u2028separator\r\n\x85\x0c", "lone \ud83d surrogate", 'quote " \\']
)
def test_any_response_stays_on_one_line_and_reads_back_equal(path, response):
    write_trajectory(path, [group(1.0, 0.0, response=response)], rollout_id=7)
    _, samples = read_trajectory(path)
    assert [sample["response"] for sample in samples] == [response, response]


def test_a_file_that_could_not_be_written_whole_leaves_the_old_one(path):
    write_trajectory(path, [group(1.0)], rollout_id=7)
    before = path.read_text()
    with pytest.raises(IndexError):
        write_trajectory(path, [group(1.0, 0.0)], rollout_id=7, advantages=[[0.5]])
    with pytest.raises(TypeError):
        write_trajectory(path, [group(1.0)], rollout_id=7, advantages=[[object()]])  # type: ignore[list-item]
    assert path.read_text() == before
    assert list(path.parent.iterdir()) == [path]


def test_an_empty_rollout_has_a_summary_only(path):
    write_trajectory(path, [], rollout_id=7)
    summary, samples = read_trajectory(path)
    assert summary["num_samples"] == 0
    assert samples == []


def test_no_answer_commands_the_terminal_that_shows_the_file(path):
    response = "\x1b[2J \x9b2J \x85 \u2028 \u202e \x7f tab\t 四 😀"
    write_trajectory(path, [group(1.0, response=response)], rollout_id=7)
    text = path.read_text(encoding="utf-8")
    assert all(line.isprintable() for line in text.split("\n")) and "四 😀" in text
    assert [sample["response"] for sample in read_trajectory(path)[1]] == [response]
