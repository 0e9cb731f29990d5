"""Samples of random tokens, for benchmarks of an actor alone."""

from __future__ import annotations

import random

import numpy as np

from xrl.algorithms.sample import sample_of
from xrl.types import Completion, Sample


def random_samples(
    *, vocab_size: int, num_groups: int, num_samples: int, prompt_tokens: int, response_tokens: int
) -> list[Sample]:
    """`num_samples` answers to each of so many prompts, the same at every call; log-probs are nobody's."""
    rng = random.Random(0)
    samples: list[Sample] = []
    for group_id in range(num_groups):
        prompt = [rng.randrange(vocab_size) for _ in range(prompt_tokens)]
        for _ in range(num_samples):
            response = np.array([rng.randrange(vocab_size) for _ in range(response_tokens)], np.int32)
            logprobs = np.array([-12.0 - 0.1 * rng.random() for _ in response], np.float32)
            samples.append(
                sample_of(
                    prompt,
                    Completion(token_ids=response, logprobs=logprobs, finish_reason="stop", weights_version=0),
                    advantage=rng.gauss(0, 1),
                    group_id=group_id,
                    episode_id=len(samples),
                    temperature=1.0,
                )
            )
    return samples
