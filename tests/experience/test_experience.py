"""A batch a step: what is asked for it, what it holds on which rank, and which rollouts are refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import ProcessGroup

from tests.experience.askings import finished
from tests.ranks import on_ranks, world_of_one
from tests.samples import answer, group, judged, prompt
from xrl.algorithms.grpo import GRPO
from xrl.config import AlgorithmConfig
from xrl.experience.asking import Asking, Need
from xrl.experience.collect import Collected
from xrl.experience.experience import Batch, Experience, SampledRollouts, refuse_useless
from xrl.launch.exit import RunEnded
from xrl.launch.stop import StopAsked, StopRequest
from xrl.parallel.control import Control
from xrl.rollout.dispatch import RolloutCounts
from xrl.types import Group, Prompt, SamplingParams

SAMPLING = SamplingParams(seed=1000)
ALGORITHM = GRPO(AlgorithmConfig())


@pytest.fixture(autouse=True, scope="module")
def world() -> Iterator[ProcessGroup]:
    with world_of_one() as found:
        yield found


class Answers:
    """In the place of the collector."""

    def __init__(self, *groups: Group, num_carried: int = 0, num_lost: int = 0) -> None:
        self.groups, self.num_carried, self.num_lost = list(groups), num_carried, num_lost
        self.calls: list[tuple[int, dict[str, Any]]] = []

    def collect(self, prompts: Sequence[Prompt], **call: Any) -> Asking[Collected]:
        self.calls.append((len(prompts), call))
        for _ in range(self.num_lost):
            yield Need.WEIGHTS
        return Collected(groups=self.groups, counts=RolloutCounts(), seconds=2.0, num_tokens=8)


class Stream:
    """Prompts without an end."""

    epoch = 0.5

    def __init__(self) -> None:
        self.num_taken = 0

    def next_batch(self, size: int) -> list[Prompt]:
        self.num_taken += size
        return [prompt(5, id=self.num_taken - size + place) for place in range(size)]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.num_taken}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.num_taken = state["position"]


def rollouts(answers: Answers, *, num_in_flight: int = 2, enough: int | None = None) -> SampledRollouts:
    prompts = SimpleNamespace(
        epoch=0.5,
        num_taken=12,
        next_batch=lambda count: [prompt(5, id=n) for n in range(count)],
        state_dict=lambda: {"position": 12},
    )
    return SampledRollouts(
        prompts, answers, ALGORITHM.score, SAMPLING, num_samples=2, num_in_flight=num_in_flight, enough=enough
    )


def test_a_batch_is_what_the_algorithm_makes_of_the_answers() -> None:
    answers = Answers(group(1.0, 0.0), group(1.0, 1.0))
    batch = finished(rollouts(answers).take(3))
    assert batch.groups == answers.groups
    assert batch.scored is not None and batch.samples == batch.scored.samples and len(batch.scored.samples) == 2
    assert batch.metrics["epoch"] == 0.5 and batch.metrics["tokens_per_s/rollout"] == 4.0
    assert batch.metrics["reward/mean"] == 0.75
    call = answers.calls[0][1]
    assert (call["sampling"].seed, call["first_ordinal"]) == (1001, 12)  # of the stream, whichever the step


@pytest.mark.parametrize(("num_carried", "num_prompts"), [(0, 5), (2, 3), (7, 0)])
def test_what_is_carried_takes_the_place_of_new_prompts(num_carried: int, num_prompts: int) -> None:
    answers = Answers(group(1.0, 0.0), num_carried=num_carried)
    finished(rollouts(answers, num_in_flight=5, enough=4).take(1))
    assert [(count, call["enough"]) for count, call in answers.calls] == [(num_prompts, 4)]


def test_a_rollout_that_is_cut_off_leaves_prompts_where_they_were() -> None:
    class CutOff(Answers):
        def collect(self, prompts: Sequence[Prompt], **call: Any) -> Asking[Collected]:
            call["while_waiting"]()
            return super().collect(prompts, **call)

    dataset = Stream()
    stop = StopRequest()
    source = SampledRollouts(
        dataset,
        CutOff(group(1.0, 0.0)),
        ALGORITHM.score,
        SAMPLING,
        num_samples=2,
        num_in_flight=3,
        check_stop=stop.check,
    )
    finished(source.take(1))
    stop.ask("SIGUSR1")
    with pytest.raises(StopAsked):
        finished(source.take(2))
    assert dataset.num_taken == 3


def test_other_ranks_know_of_a_batch_and_hold_nothing_of_it() -> None:
    def play(rank: int, control: ProcessGroup) -> list[Any]:
        source = rollouts(Answers(group(1.0, 0.0), num_lost=1)) if rank == 0 else None
        experience = Experience(source, Control(control, leads=rank == 0))
        return [experience.take(1), experience.take(1)]

    lead, other = on_ranks(2, play)
    assert lead[0] is other[0] is Need.WEIGHTS
    assert isinstance(other[1], Batch) and other[1].samples is None and not other[1].groups
    assert len(lead[1].samples) == 2


def test_a_rollout_of_which_half_is_judged_is_kept_and_of_which_less_is_refused() -> None:
    asked = prompt(5)

    def collected(num_failed: int) -> Collected:
        failed = [judged(asked, answer(4), None, error="KeyError: 'x'")] * num_failed
        episodes = (*failed, *[judged(asked, answer(4), 1.0)] * (4 - num_failed))
        return Collected(groups=[Group(episodes=episodes)], counts=RolloutCounts(), seconds=1.0, num_tokens=4)

    refuse_useless(7, collected(2))
    with pytest.raises(RunEnded) as caught:
        refuse_useless(7, collected(3))
    assert caught.value.sentence == "rollout 7: the judge failed on 3 of 4 answers, first with KeyError: 'x'"
