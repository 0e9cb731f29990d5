"""What stands in for the fleet where prompts become groups: workers that answer as a test says, in its order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tests.samples import words
from xrl.rollout.dispatch import NoneReady, RolloutCounts
from xrl.types import Completion, GenerateRequest

# What becomes of a request: its answers, none of them as it was cut off, or None as it was given up.
Answers = Callable[[GenerateRequest], Sequence[Completion] | None]
SPECIAL = 90
WHY_FAILED = "rollout worker 0 (10.0.0.2:80): out of memory"


class ScriptedWorkers:
    """Answers requests one after the other, and keeps those it was asked; cut short, it goes on as `after_cut` says."""

    def __init__(
        self, answers: Answers, *, after_cut: Answers | None = None, order: Callable[[int], Sequence[int]] = range
    ) -> None:
        """
        Args:
            answers: to a request; after `cut_short`, `after_cut` is asked instead.
            order: number of requests -> their places, in the order in which they end.
        """
        self.answers, self.after_cut, self.order = answers, after_cut or answers, order
        self.asked: list[list[GenerateRequest]] = []  # of each rollout
        self.num_cuts = 0
        # How often all workers are lost before the answer to a request.
        self.num_lost: Callable[[GenerateRequest], int] = lambda request: 0
        self._is_cut = False

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        counts: RolloutCounts,
        *,
        updates: bool = False,
        while_waiting: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[int, list[Completion] | None] | NoneReady]:
        self.asked.append(list(requests))
        self._is_cut = False
        counts.sent += len(requests)
        for place in self.order(len(requests)):
            while_waiting()
            for _ in range(self.num_lost(requests[place])):
                yield NoneReady()
            found = (self.after_cut if self._is_cut else self.answers)(requests[place])
            if found is None:
                counts.failed += 1
                counts.why_failed = WHY_FAILED
            elif found and all(each.finish_reason in ("stop", "length") for each in found):
                counts.finished += 1
            else:
                counts.unfinished += 1
            yield place, None if found is None else list(found)

    def cut_short(self) -> None:
        self.num_cuts += 1
        self._is_cut = True


class Words:
    """A tokenizer whose tokens are their numbers; those from SPECIAL on are special."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False, **_: Any) -> str:
        return words([token for token in token_ids if token < SPECIAL or not skip_special_tokens])
