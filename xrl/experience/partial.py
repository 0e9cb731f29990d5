"""Groups in progress: what is still to be asked, and how an answer that was cut off goes on in the next rollout."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from xrl.types import Completion, GenerateRequest, Prompt, SamplingParams

# Odd and large: seeds of neighbouring groups and of neighbouring runs never meet.
_SEED_STEP = 0x9E3779B97F4A7C15


@dataclass(kw_only=True)
class GroupInProgress:
    """A prompt and its answers so far: none yet, or one for each sample, whole or cut off."""

    prompt: Prompt
    ordinal: int  # of the group among those of its stream: what it draws depends on it
    answers: list[Completion] = field(default_factory=list)

    @property
    def is_whole(self) -> bool:
        return bool(self.answers) and all(answer.is_whole for answer in self.answers)

    def copy(self) -> GroupInProgress:
        """The same as it is now; what becomes of one of the two does not change the other."""
        return GroupInProgress(prompt=self.prompt, ordinal=self.ordinal, answers=list(self.answers))

    def requests(self, sampling: SamplingParams, num_samples: int, name: str) -> list[GenerateRequest]:
        """What is to be asked: the prompt for all samples, or each cut-off answer for the rest of it.

        Args:
            sampling: of the stream of groups; each draws by a seed of its own.
            name: unique among the requests in flight.
        """
        # The ordinal, not the prompt's id: it comes again in the next epoch. And not the place in a rollout: whenever
        # and wherever it goes on, a group draws what it would have drawn at once.
        sampling = dataclasses.replace(sampling, seed=(sampling.seed * _SEED_STEP + self.ordinal) % 2**63)
        if not self.answers:
            return [
                GenerateRequest(id=name, token_ids=self.prompt.token_ids, num_samples=num_samples, sampling=sampling)
            ]
        return [
            GenerateRequest(
                id=f"{name}-{index}",
                token_ids=[*self.prompt.token_ids, *answer.token_ids.tolist()],
                num_samples=1,
                sampling=dataclasses.replace(sampling, max_new_tokens=sampling.max_new_tokens - len(answer.token_ids)),
                first_sample=index,
                num_drawn=len(answer.token_ids),
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
