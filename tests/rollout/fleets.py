"""Fleets of real worker processes around the scripted engine, and what goes through them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from tests.rollout.scripted_engine import ANSWER
from xrl.rollout.fleet import Fleet, RolloutCounts
from xrl.types import Completion, GenerateRequest, SamplingParams, WeightBucket

ENGINE = "tests.rollout.scripted_engine:make"
VOCAB_SIZE = 9999
ROOT = Path(__file__).parents[2]
MakeFleet = Callable[..., Fleet]


def bucket(part: str, value: float, *, version: int = 0, size: int = 3) -> WeightBucket:
    return WeightBucket(version=version, part=part, tensors={"w": torch.full((size,), value)})


def request(place: int, action: int = ANSWER, *, num_samples: int = 2) -> GenerateRequest:
    """The scripted engine repeats the prompt: its last token is the one that stops."""
    sampling = SamplingParams(max_new_tokens=8, stop_token_ids=(place,))
    return GenerateRequest(id=f"r{place}", token_ids=[action, place], num_samples=num_samples, sampling=sampling)


def generate(fleet: Fleet, requests: list[GenerateRequest]) -> tuple[dict[int, list[Completion] | None], RolloutCounts]:
    counts = RolloutCounts()
    results: dict[int, list[Completion] | None] = {}
    for place, completions in fleet.generate(requests, counts):
        assert place not in results
        results[place] = completions
    return results, counts
