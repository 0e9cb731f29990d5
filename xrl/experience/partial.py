"""Groups in progress: what is still to be asked, and how an answer that was cut off goes on in the next rollout."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from xrl.types import Completion, GenerateRequest, Prompt, SamplingParams

# Odd and large, and not the one between rollouts: seeds of continuations and of whole groups never meet.
_SEED_STEP = 0xD1342543DE82EF95


@dataclass(kw_only=True)
class GroupInProgress:
    """A prompt and its answers so far: none yet, or one for each sample, whole or cut off."""

    prompt: Prompt
    answers: list[Completion] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        return bool(self.answers) and all(answer.is_whole for answer in self.answers)

    def requests(self, sampling: SamplingParams, num_samples: int, name: str) -> list[GenerateRequest]:
        """What is to be asked: the prompt for all samples, or each cut-off answer for the rest of it."""
        if not self.answers:
            return [
                GenerateRequest(id=name, token_ids=self.prompt.token_ids, num_samples=num_samples, sampling=sampling)
            ]
        return [
            GenerateRequest(
                id=f"{name}-{index}",
                token_ids=[*self.prompt.token_ids, *answer.token_ids.tolist()],
                num_samples=1,
                sampling=dataclasses.replace(
                    sampling,
                    max_new_tokens=sampling.max_new_tokens - len(answer.token_ids),
                    seed=(sampling.seed + (index + 1) * _SEED_STEP) % 2**63,
                ),
            )
            for index, answer in enumerate(self.answers)
            if not answer.is_whole
        ]

    def take(self, places: Sequence[int], completions: Sequence[Completion]) -> None:
        """Add what came back for the samples at `places`; an answer that was cut off before grows by it."""
        if not self.answers:
            self.answers = list(completions)
            return
        for place, completion in zip(places, completions, strict=True):
            self.answers[place] = joined(self.answers[place], completion)

    def places(self, num_samples: int) -> list[list[int]]:
        """The samples that each of `requests` is for."""
        if not self.answers:
            return [list(range(num_samples))]
        return [[index] for index, answer in enumerate(self.answers) if not answer.is_whole]


def joined(first: Completion, second: Completion) -> Completion:
    """An answer and its continuation, each with the log-probs and the version it was sampled with."""
    parts = (*_parts_of(first), *_parts_of(second))
    return Completion(
        token_ids=np.concatenate([first.token_ids, second.token_ids]),
        logprobs=np.concatenate([first.logprobs, second.logprobs]),
        finish_reason=second.finish_reason,
        weights_version=second.weights_version,
        parts=tuple(part for part in parts if part[1]),
    )


def _parts_of(completion: Completion) -> tuple[tuple[int, int], ...]:
    return completion.parts or ((completion.weights_version, len(completion.token_ids)),)
