"""Actor and engines on the same devices: who leaves before who comes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import ClassVar

import pytest
from torch.distributed import ProcessGroup

from tests.ranks import world_of_one
from xrl.algorithms.grpo import GRPO
from xrl.config import AlgorithmConfig
from xrl.experience.turns import DeviceTurns, TurnTakingLearner, TurnTakingPublisher
from xrl.parallel.control import Control
from xrl.rollout.publisher import Published
from xrl.types import Sample, UpdateReport


@pytest.fixture(scope="module")
def world() -> Iterator[ProcessGroup]:
    with world_of_one() as found:
        yield found


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def turns(log: list[str], world: ProcessGroup) -> DeviceTurns:
    engines = SimpleNamespace(sleep=lambda: log.append("sleep"), wake=lambda: log.append("wake"))
    memory = SimpleNamespace(offload=lambda: log.append("offload"), restore=lambda: log.append("restore"))
    return DeviceTurns(engines, memory, Control(world, leads=True))


def test_engines_sleep_before_the_actor_learns(turns: DeviceTurns, log: list[str]) -> None:
    class Learner:
        seconds: ClassVar[dict[str, float]] = {"update": 2.0}

        def learn(self, samples: Sequence[Sample] | None, algorithm: object) -> list[UpdateReport]:
            log.append("learn")
            return []

    learner = TurnTakingLearner(Learner(), turns)
    learner.learn([], GRPO(AlgorithmConfig()))
    assert log == ["sleep", "restore", "learn"]
    assert learner.seconds == {"update": 2.0}


def test_the_actor_leaves_before_engines_take_the_weights_and_they_wake_behind_it(
    turns: DeviceTurns, log: list[str]
) -> None:
    class Inner:
        def publish(self, *, version: int) -> Published:
            log.append(f"publish {version}")
            return Published(metrics={"seconds/publish": 1.0}, checksums=("a",))

    found = TurnTakingPublisher(Inner(), turns).publish(version=3)
    assert log == ["offload", "sleep", "publish 3", "wake"]
    assert (found.checksums, found.metrics["seconds/publish"]) == (("a",), 1.0)
    assert found.metrics["seconds/turns"] > 0


def test_seconds_are_those_since_they_were_asked_for_last(turns: DeviceTurns) -> None:
    turns.to_actor()
    assert turns.take_seconds() > 0
    assert turns.take_seconds() == 0.0
