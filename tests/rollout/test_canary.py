"""What the canary asks, and what it says to differences; whole runs with it are in tests/e2e/test_workers.py."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.samples import answer, contents, sample
from xrl.config import RolloutConfig
from xrl.rollout.canary import Canary, CanaryFailed
from xrl.rollout.fleet import Fleet
from xrl.types import GenerateRequest, SamplingParams


@pytest.fixture
def canary() -> Canary:
    fleet = cast(Fleet, SimpleNamespace(version=7))
    config = RolloutConfig(canary_warn=0.1, canary_stop=1.0)
    return Canary(fleet, config, dtype="float32", vocab_size=100, max_model_len=64, sampling=SamplingParams())


def test_the_largest_difference_is_reported(canary: Canary, caplog: pytest.LogCaptureFixture) -> None:
    assert canary.judge([0.01, 0.05, 0.02]) == 0.05
    assert canary.judge([]) == 0.0
    assert not caplog.records


def test_a_difference_over_the_first_threshold_warns(canary: Canary, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="xrl"):
        assert canary.judge([0.5, 0.2]) == 0.5
    assert "weights version 7" in caplog.text and "--canary-warn 0.1" in caplog.text


def test_a_difference_over_the_second_threshold_ends_the_run(canary: Canary) -> None:
    with pytest.raises(CanaryFailed, match=r"differ from the actor's by 1.5 on average, more than --canary-stop 1"):
        canary.judge([0.0, 1.5])


@pytest.mark.parametrize("difference", [math.nan, math.inf])
def test_what_is_not_finite_ends_the_run_and_says_so(canary: Canary, difference: float) -> None:
    with pytest.raises(CanaryFailed, match="version 7 log-probs .* are not finite"):
        canary.judge([0.0, difference, 0.0])


class Workers:
    """Two workers, 0 and 3, each with an answer of its own."""

    version = 7

    def __init__(self, numbers: tuple[int, ...] = (0, 3)) -> None:
        self.numbers = numbers
        self.asked: list[tuple[GenerateRequest, float]] = []

    def ask_all(self, request: GenerateRequest, *, timeout_s: float) -> list[Any]:
        self.asked.append((request, timeout_s))
        return [(SimpleNamespace(number=number), [answer(number, 11)]) for number in self.numbers]


def asking(workers: Workers, *, max_model_len: int = 64, vocab_size: int = 100, canary_tokens: int = 16) -> Canary:
    return Canary(
        cast(Fleet, workers),
        RolloutConfig(canary_tokens=canary_tokens, rollout_timeout_s=5.0),
        dtype="float32",
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        sampling=SamplingParams(temperature=0.7, top_k=5, top_p=0.9, max_new_tokens=9, stop_token_ids=(2,), seed=3),
    )


def test_every_worker_is_asked_the_same_and_gives_one_sample_of_its_own() -> None:
    workers = Workers()
    prompt = [19, 38, 57, 76, 95, 14, 33, 52]
    assert [contents(each) for each in asking(workers).sample()] == [
        contents(sample(prompt, [0, 11], advantage=0.0, group_id=0, episode_id=0, temperature=0.7)),
        contents(sample(prompt, [3, 11], advantage=0.0, group_id=3, episode_id=1, temperature=0.7)),
    ]
    # Of the whole distribution, which is what the actor scores, and never ended by a stop token.
    sampling = SamplingParams(temperature=0.7, top_k=0, top_p=1.0, max_new_tokens=16, stop_token_ids=(), seed=3)
    request = GenerateRequest(id="canary-7", token_ids=prompt, num_samples=1, sampling=sampling)
    assert workers.asked == [(request, 5.0)]


@pytest.mark.parametrize(("max_model_len", "num_prompt", "num_answer"), [(20, 8, 12), (8, 7, 1), (2, 1, 1)])
def test_prompt_and_answer_fit_into_the_engine(max_model_len: int, num_prompt: int, num_answer: int) -> None:
    workers = Workers()
    asking(workers, max_model_len=max_model_len).sample()
    ((request, _),) = workers.asked
    assert (len(request.token_ids), request.sampling.max_new_tokens) == (num_prompt, num_answer)


def test_the_prompt_is_of_the_model_s_own_tokens() -> None:
    workers = Workers()
    asking(workers, vocab_size=5).sample()
    assert set(workers.asked[0][0].token_ids) <= set(range(5))


def test_where_no_worker_answers_there_is_nothing_to_score() -> None:
    assert asking(Workers(())).sample() == []
