"""The data that flows through a step, in short: tests of the path build prompts, answers and samples here.

When those types change, this is the one place where the tests do.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xrl.algorithms.sample import sample_of
from xrl.types import Completion, Episode, FinishReason, Group, Prompt, Sample, Verdict

TEMPERATURE = 1.0
_episodes = itertools.count()


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer(Completion):
    """Equal to every completion of the same values and types; completions themselves are compared by identity."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Completion) and contents(self) == contents(other)


def prompt(*token_ids: int, id: int = 0, ground_truth: str = "1") -> Prompt:
    """A prompt of these tokens; its text are their numbers."""
    return Prompt(id=id, token_ids=list(token_ids), text=words(token_ids), ground_truth=ground_truth)


def answer(
    *token_ids: int,
    reason: FinishReason = "stop",
    version: int = 0,
    parts: tuple[tuple[int, int], ...] = (),
    logprobs: Sequence[float] | None = None,
) -> Answer:
    """An answer of these tokens; each has the log-prob of `logprobs_of` unless they are given."""
    return Answer(
        token_ids=np.array(token_ids, np.int32),
        logprobs=np.array(logprobs_of(token_ids) if logprobs is None else logprobs, np.float32),
        finish_reason=reason,
        weights_version=version,
        parts=parts,
    )


def judged(asked: Prompt, completion: Completion, reward: float | None, *, error: str = "") -> Episode:
    """An answer and what its judge said; as text it is the numbers of its tokens.

    Args:
        error: "kind: detail" of a judge that failed.
    """
    failure, _, detail = error.partition(": ")
    verdict = Verdict(reward=reward, failure=failure, detail=detail)
    text = words(completion.token_ids.tolist())
    return Episode.of_answer(asked, completion, text, verdict, temperature=TEMPERATURE)


def group(*rewards: float | None, asked: Prompt | None = None) -> Group:
    """Answers to one prompt with these rewards: answer n is the tokens n and 2."""
    one = prompt(5, 6) if asked is None else asked
    return Group(episodes=tuple(judged(one, answer(place, 2), reward) for place, reward in enumerate(rewards)))


def completion_of(episode: Episode) -> Completion:
    """Of an episode's only turn."""
    (turn,) = episode.turns
    return turn.completion


def sample(
    prompt_ids: Sequence[int],
    response_ids: Sequence[int],
    *,
    advantage: float = 1.0,
    group_id: int = 0,
    logprobs: Sequence[float] | None = None,
    episode_id: int | None = None,
    temperature: float = TEMPERATURE,
) -> Sample:
    """An answer to train on, of an episode of its own; each token has the log-prob of `logprobs_of` unless given."""
    return sample_of(
        prompt_ids,
        answer(*response_ids, logprobs=logprobs),
        advantage=advantage,
        group_id=group_id,
        episode_id=next(_episodes) if episode_id is None else episode_id,
        temperature=temperature,
    )


def response_of(found: Sample) -> list[int]:
    """What is behind the prompt."""
    return found.token_ids[found.prompt_length :].tolist()


def contents(found: Sample | Completion) -> dict[str, Any]:
    """A sample or an answer as values that can be compared, with the types of its arrays."""
    fields = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    return {name: (value.dtype, value.tolist()) if hasattr(value, "dtype") else value for name, value in fields.items()}


def logprobs_of(token_ids: Sequence[int]) -> list[float]:
    """A log-prob that tells a token by its number, and is exact in fp32: token 3 has -3/16."""
    return [-token / 16 for token in token_ids]


def words(token_ids: Sequence[int]) -> str:
    """Tokens as a tokenizer gives them whose words are their numbers."""
    return " ".join(map(str, token_ids))
