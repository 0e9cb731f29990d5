"""Groups in progress: what is still to be asked, and how an answer that was cut off goes on in the next rollout."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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

    def requests(
        self, sampling: SamplingParams, num_samples: int, name: str, *, most_tokens: int | None = None
    ) -> list[GenerateRequest]:
        """What is to be asked: the prompt for all samples, or each cut-off answer for the rest of it.

        Args:
            sampling: of the stream of groups; each draws by a seed of its own.
            name: unique among the requests in flight.
            most_tokens: by which an answer may grow now; default: all that are left of its length.
        """
        # The ordinal, not the prompt's id: it comes again in the next epoch. And not the place in a rollout: whenever
        # and wherever it goes on, a group draws what it would have drawn at once.
        sampling = dataclasses.replace(sampling, seed=(sampling.seed * _SEED_STEP + self.ordinal) % 2**63)
        longest = sampling.max_new_tokens
        self.answers = [_ended_at(answer, longest) for answer in self.answers]

        def growing(num_drawn: int) -> SamplingParams:
            left = longest - num_drawn
            return dataclasses.replace(sampling, max_new_tokens=left if most_tokens is None else min(left, most_tokens))

        if not self.answers:
            return [
                GenerateRequest(id=name, token_ids=self.prompt.token_ids, num_samples=num_samples, sampling=growing(0))
            ]
        return [
            GenerateRequest(
                id=f"{name}-{index}",
                token_ids=[*self.prompt.token_ids, *answer.token_ids.tolist()],
                num_samples=1,
                sampling=growing(len(answer.token_ids)),
                first_sample=index,
                num_drawn=len(answer.token_ids),
            )
            for index, answer in enumerate(self.answers)
            if not answer.is_whole
        ]

    def take(self, places: Sequence[int], completions: Sequence[Completion], *, longest: int | None = None) -> None:
        """Add what came back for the samples at `places`; an answer that was cut off before grows by it.

        Args:
            longest: of an answer, in tokens, where less was asked for: one that is shorter has not ended yet.
        """
        if self.answers:
            for place, completion in zip(places, completions, strict=True):
                self.answers[place] = joined(self.answers[place], completion)
        else:
            self.answers = list(completions)
        if longest is not None:
            self.answers = [_still_growing(answer, longest) for answer in self.answers]

    def places(self, num_samples: int) -> list[list[int]]:
        """The samples that each of `requests` is for."""
        if not self.answers:
            return [list(range(num_samples))]
        return [[index] for index, answer in enumerate(self.answers) if not answer.is_whole]


def groups_state(groups: Sequence[GroupInProgress]) -> dict[str, Any]:
    """Groups in progress as values and arrays; a prompt is told by its group's ordinal."""
    answers = [answer for group in groups for answer in group.answers]
    return {
        "groups": [
            {"ordinal": group.ordinal, "answers": [_answer_state(answer) for answer in group.answers]}
            for group in groups
        ],
        "token_ids": np.concatenate([np.zeros(0, np.int32), *(answer.token_ids for answer in answers)]),
        "logprobs": np.concatenate([np.zeros(0, np.float32), *(answer.logprobs for answer in answers)]),
    }


def groups_of_state(state: Mapping[str, Any], prompt_of: Callable[[int], Prompt]) -> list[GroupInProgress]:
    """The groups that `groups_state` was given.

    Args:
        prompt_of: the prompt of a group's ordinal.
    """
    groups, start = [], 0
    for saved in state["groups"]:
        answers = []
        for answer in saved["answers"]:
            stop = start + answer["num_tokens"]
            answers.append(
                Completion(
                    token_ids=state["token_ids"][start:stop],
                    logprobs=state["logprobs"][start:stop],
                    finish_reason=answer["finish_reason"],
                    weights_version=answer["weights_version"],
                    parts=tuple((version, count) for version, count in answer["parts"]),
                )
            )
            start = stop
        groups.append(GroupInProgress(prompt=prompt_of(saved["ordinal"]), ordinal=saved["ordinal"], answers=answers))
    return groups


def _answer_state(answer: Completion) -> dict[str, Any]:
    return {
        "num_tokens": len(answer.token_ids),
        "finish_reason": answer.finish_reason,
        "weights_version": answer.weights_version,
        "parts": [list(part) for part in answer.parts],
    }


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


def _ended_at(answer: Completion, longest: int) -> Completion:
    """A cut-off answer that has its whole length already: a run that goes on may have a shorter one."""
    if answer.is_whole or len(answer.token_ids) < longest:
        return answer
    return dataclasses.replace(answer, finish_reason="length")


def _still_growing(answer: Completion, longest: int) -> Completion:
    """An answer that ended at the length that was asked for, and not at its own: it was cut off."""
    if answer.finish_reason != "length" or len(answer.token_ids) >= longest:
        return answer
    return dataclasses.replace(answer, finish_reason="abort")


def _parts_of(completion: Completion) -> tuple[tuple[int, int], ...]:
    return completion.parts or ((completion.weights_version, len(completion.token_ids)),)
