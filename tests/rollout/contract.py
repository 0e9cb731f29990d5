"""What every engine promises, each promise a check; `Case` is an engine and what is known about its model."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.rollout.engines import generate, request
from xrl.rollout.engine import Engine, EngineError, EngineNotReady
from xrl.types import WeightBucket

TOLERANCE = 1e-4  # of log-probs
PROMPTS = [[7], [3, 1, 4, 1, 5], [2, 2, 6, 9, 8, 11, 0, 3, 10]]


class Model(Protocol):
    """The same model as the engine's, computed by somebody else."""

    def buckets(self, version: int) -> list[WeightBucket]: ...

    def logits(self, token_ids: list[int]) -> Tensor:
        """[len(token_ids), V] fp32 of a whole sequence."""
        ...


@dataclass
class Case:
    engine: Engine
    make_model: Callable[[int], Model]  # from a seed
    memory: Callable[[], float]  # bytes that `sleep` ought to free
    model: Model = field(init=False)
    version: int = -1

    def update(self, seed: int) -> None:
        """Give the engine the weights of `seed`, under the next version."""
        self.version += 1
        self.model = self.make_model(seed)
        for bucket in self.model.buckets(self.version):
            self.engine.load_part(bucket)
        self.engine.finish_update(self.version)

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        """The model's own answer."""
        ids = list(prompt)
        for _ in range(num_tokens):
            ids.append(int(self.model.logits(ids)[-1].argmax()))
        return ids[len(prompt) :]

    def logprobs(self, prompt: list[int], response: list[int], temperature: float) -> Tensor:
        """[len(response)] the model's own."""
        logits = self.model.logits(prompt + response)[len(prompt) - 1 : -1]
        return (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]

    def check_answers(self) -> None:
        """The engine samples from the model, whatever came before."""
        for prompt in PROMPTS:
            (completion,) = generate(self.engine, prompt, temperature=0, max_new_tokens=8)
            assert completion.token_ids.tolist() == self.greedy(prompt, 8)
            assert completion.weights_version == self.engine.weights_version == self.version


def nothing_is_answered_before_the_first_weights(case: Case) -> None:
    assert case.engine.weights_version == -1
    with pytest.raises(EngineNotReady):
        generate(case.engine, [1])
    case.update(0)
    case.check_answers()


def greedy_answers_are_the_models_and_repeat(case: Case) -> None:
    case.update(0)
    answers = [
        [generate(case.engine, prompt, temperature=0)[0].token_ids.tolist() for prompt in PROMPTS] for _ in range(2)
    ]
    assert answers[0] == answers[1] == [case.greedy(prompt, 16) for prompt in PROMPTS]


def logprobs_are_the_models_at_the_sampling_temperature(case: Case) -> None:
    case.update(1)
    for temperature in (1.0, 0.6):
        for prompt in PROMPTS:
            for completion in generate(case.engine, prompt, num_samples=2, temperature=temperature, seed=3):
                expected = case.logprobs(prompt, completion.token_ids.tolist(), temperature)
                torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=TOLERANCE)


def answers_are_arrays_of_32_bits(case: Case) -> None:
    case.update(1)
    for completion in generate(case.engine, PROMPTS[1], num_samples=2):
        assert (completion.token_ids.dtype, completion.logprobs.dtype) == (np.int32, np.float32)
        assert completion.token_ids.shape == completion.logprobs.shape == (16,)


def every_update_takes_effect(case: Case) -> None:
    for seed in (2, 3, 4):
        case.update(seed)
        case.check_answers()
        (completion,) = generate(case.engine, PROMPTS[1], seed=seed)
        expected = case.logprobs(PROMPTS[1], completion.token_ids.tolist(), 1.0)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=TOLERANCE)


def buckets_come_in_any_order_and_their_memory_is_used_again(case: Case) -> None:
    case.version += 1
    case.model = case.make_model(5)
    for bucket in reversed(case.model.buckets(case.version)):
        tensors = {name: tensor.clone() for name, tensor in bucket.tensors.items()}
        case.engine.load_part(WeightBucket(version=bucket.version, part=bucket.part, tensors=tensors))
        for tensor in tensors.values():
            tensor.fill_(torch.nan)
    case.engine.finish_update(case.version)
    case.check_answers()


def a_stop_token_is_the_last_token_with_its_logprob(case: Case) -> None:
    case.update(1)
    free = generate(case.engine, PROMPTS[0], num_samples=4, seed=1, max_new_tokens=12)
    stop = int(free[0].token_ids[3])
    stopped = generate(case.engine, PROMPTS[0], num_samples=4, seed=1, max_new_tokens=12, stop_token_ids=(stop,))
    for whole, cut in zip(free, stopped, strict=True):
        ids = whole.token_ids.tolist()
        length = ids.index(stop) + 1 if stop in ids else 12
        assert cut.token_ids.tolist() == ids[:length]
        assert len(cut.logprobs) == length
        assert cut.finish_reason == ("stop" if stop in ids else "length")


def samples_and_seeds_differ_and_a_seed_repeats(case: Case) -> None:
    case.update(1)
    answers = [generate(case.engine, PROMPTS[1], num_samples=3, seed=seed) for seed in (1, 2)]
    texts = [tuple(completion.token_ids) for completions in answers for completion in completions]
    assert len(texts) == len(set(texts)) == 6
    again = generate(case.engine, PROMPTS[1], num_samples=3, seed=1)
    assert [tuple(completion.token_ids) for completion in again] == texts[:3]


def a_group_may_be_asked_for_in_parts(case: Case) -> None:
    case.update(1)
    whole = generate(case.engine, PROMPTS[1], num_samples=4, seed=5)
    parts = [
        *generate(case.engine, PROMPTS[1], num_samples=1, seed=5),
        *generate(case.engine, PROMPTS[1], num_samples=3, first_sample=1, seed=5),
    ]
    assert [answer.token_ids.tolist() for answer in parts] == [answer.token_ids.tolist() for answer in whole]


def sleep_frees_memory_and_wake_goes_on(case: Case) -> None:
    case.update(0)
    future = case.engine.submit(request(PROMPTS[0], num_samples=2, max_new_tokens=40))
    used = case.memory()
    while not future.done():
        used = max(used, case.memory())
        time.sleep(0.002)
    case.engine.sleep()
    assert case.memory() < used - 500
    with pytest.raises(EngineNotReady):
        generate(case.engine, PROMPTS[0])
    case.engine.wake()
    case.check_answers()


def weights_may_be_dropped_for_sleep_and_come_while_it_lasts(case: Case) -> None:
    case.update(0)
    case.engine.sleep(keep_weights=False)
    for seed in (6, 7):  # the second one finds weights that nobody has used
        case.update(seed)
        with pytest.raises(EngineNotReady):
            generate(case.engine, PROMPTS[0])
    case.engine.wake()
    case.check_answers()


def abort_returns_what_there_is_and_spares_the_others(case: Case) -> None:
    case.update(0)
    futures = {
        name: case.engine.submit(request(PROMPTS[0], id=name, num_samples=2, max_new_tokens=num_tokens))
        for name, num_tokens in (("long", 240), ("short", 24))
    }
    case.engine.abort("nobody")
    case.engine.abort("long")
    aborted = futures["long"].result(timeout=60)
    assert [completion.finish_reason for completion in aborted] == ["abort"] * 2
    assert all(len(completion.token_ids) == len(completion.logprobs) < 240 for completion in aborted)
    assert [len(completion.token_ids) for completion in futures["short"].result(timeout=60)] == [24] * 2
    case.check_answers()


def changes_of_state_are_refused_while_requests_run(case: Case) -> None:
    case.update(0)
    future = case.engine.submit(request(PROMPTS[0], num_samples=2, max_new_tokens=240))
    with pytest.raises(EngineError):
        case.engine.sleep()
    with pytest.raises(EngineError):
        case.engine.load_part(case.model.buckets(case.version + 1)[0])
    with pytest.raises(ValueError):
        case.engine.submit(request(PROMPTS[0]))
    case.engine.abort()
    future.result(timeout=60)
    case.check_answers()


def wrong_tensors_are_refused_and_the_update_can_go_on(case: Case) -> None:
    case.version += 1
    case.model = case.make_model(8)
    first, *others = case.model.buckets(case.version)
    for name, tensor in (("no.such.tensor", torch.ones(3)), (next(iter(first.tensors)), torch.ones(3, 5))):
        with pytest.raises(EngineError, match=name.replace(".", r"\.")):
            case.engine.load_part(WeightBucket(version=case.version, part=first.part, tensors={name: tensor}))
    for bucket in others:
        case.engine.load_part(bucket)
    with pytest.raises(EngineError, match=next(iter(first.tensors))):
        case.engine.finish_update(case.version)
    with pytest.raises(EngineNotReady):
        generate(case.engine, PROMPTS[0])
    case.engine.load_part(first)
    case.engine.finish_update(case.version)
    case.check_answers()


def requests_that_cannot_run_are_refused(case: Case) -> None:
    case.update(0)
    impossible = (
        {"token_ids": []},
        {"token_ids": [1 << 30]},
        {"max_new_tokens": 1 << 20},
        {"num_samples": 0},
        {"num_drawn": 1},
        {"num_drawn": -1},
        {"first_sample": -1},
    )
    for options in impossible:
        with pytest.raises(ValueError):
            generate(case.engine, **{"token_ids": [1], **options})
    case.check_answers()


def a_closed_engine_refuses(case: Case) -> None:
    case.update(0)
    future = case.engine.submit(request(PROMPTS[0], max_new_tokens=240))
    case.engine.close()
    assert future.result(timeout=60)[0].finish_reason == "abort"
    with pytest.raises(EngineError):
        generate(case.engine, PROMPTS[0])


# On an engine that has seen nothing yet, or is of no use afterwards.
ON_A_FRESH_ENGINE = (nothing_is_answered_before_the_first_weights, a_closed_engine_refuses)
CHECKS = (
    greedy_answers_are_the_models_and_repeat,
    logprobs_are_the_models_at_the_sampling_temperature,
    every_update_takes_effect,
    buckets_come_in_any_order_and_their_memory_is_used_again,
    a_stop_token_is_the_last_token_with_its_logprob,
    samples_and_seeds_differ_and_a_seed_repeats,
    a_group_may_be_asked_for_in_parts,
    sleep_frees_memory_and_wake_goes_on,
    weights_may_be_dropped_for_sleep_and_come_while_it_lasts,
    abort_returns_what_there_is_and_spares_the_others,
    changes_of_state_are_refused_while_requests_run,
    wrong_tensors_are_refused_and_the_update_can_go_on,
    requests_that_cannot_run_are_refused,
)
