"""An answer as a row to train on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from xrl.types import Completion, Sample


def sample_of(
    prompt_ids: Sequence[int],
    completion: Completion,
    *,
    advantage: float,
    group_id: int,
    episode_id: int,
    temperature: float,
) -> Sample:
    """The prompt and its answer, of which every token is trained with the same advantage.

    Args:
        temperature: that the answer was drawn at.

    Raises:
        ValueError: the answer does not have one log-prob a token, or it was drawn greedily.
    """
    if not temperature > 0:
        raise ValueError(
            f"an answer was drawn at temperature {temperature:g}, where every token has probability 1 or 0: there is "
            f"nothing to learn from it, training needs a temperature > 0"
        )
    length = len(completion.token_ids)
    if len(completion.logprobs) != length:
        raise ValueError(
            f"an answer has {length} tokens and {len(completion.logprobs)} log-probs, the rollout engine must return "
            f"one for each"
        )
    before = len(prompt_ids)
    trained = np.zeros(before + length, np.bool_)
    trained[before:] = True
    rollout_logprobs = np.zeros(before + length, np.float32)
    rollout_logprobs[before:] = completion.logprobs
    advantages = np.zeros(before + length, np.float32)
    advantages[before:] = advantage
    versions = np.full(before + length, -1, np.int32)
    parts = completion.parts or ((completion.weights_version, length),)
    versions[before:] = np.repeat([version for version, _ in parts], [count for _, count in parts])
    return Sample(
        token_ids=np.array([*prompt_ids, *completion.token_ids], np.int32),
        trained=trained,
        rollout_logprobs=rollout_logprobs,
        advantages=advantages,
        versions=versions,
        prompt_length=before,
        group_id=group_id,
        episode_id=episode_id,
        temperature=temperature,
    )
