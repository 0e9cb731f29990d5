"""What the actor learns from: answers to the next prompts, judged and scored. The same on every rank."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from xrl.algorithms.scored import Scored
from xrl.experience.asking import Asked, Asking, Need
from xrl.experience.collect import Collected
from xrl.launch.exit import RunEnded
from xrl.launch.stop import StopAsked
from xrl.parallel.control import Control
from xrl.types import Group, Prompt, Sample, SamplingParams

logger = logging.getLogger("xrl")


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """One rollout; on rank 0, the others know that there is one."""

    groups: Sequence[Group] = ()  # judged
    scored: Scored | None = None  # what the algorithm makes of them; None on the other ranks
    metrics: Mapping[str, float] = field(default_factory=dict)  # of the sampling, and the algorithm's

    @property
    def samples(self) -> Sequence[Sample] | None:
        """What to learn from; None on the other ranks."""
        return None if self.scored is None else self.scored.samples


class Source(Protocol):
    """Where rank 0 takes rollouts from."""

    def take(self, step: int) -> Asking[Batch]:
        """One rollout."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Experience:
    """Rank 0 samples, judges and scores; the others wait for it.

    Nothing is sampled ahead: a batch is asked of the weights that were published last.
    """

    def __init__(self, source: Source | None, control: Control) -> None:
        """
        Args:
            source: on rank 0, None on the others.
        """
        self._source = source
        self._asked: Asked[Batch] = Asked(control)

    def state_dict(self) -> dict[str, Any]:
        """Where the next rollout begins; on rank 0, nothing on the others."""
        return {} if self._source is None else self._source.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on there, on rank 0.

        Raises:
            SettingsError: the state is of other data.
        """
        if self._source is not None:
            self._source.load_state_dict(state)

    def take(self, step: int) -> Batch | Need:
        """The batch of a step. Collective.

        Need.WEIGHTS, on every rank: publish the weights once more, and take again. Need.STOP, on every rank: the run is
        asked to stop; prompts and carried answers are as before the call.

        Raises:
            RunEnded: nothing can be learned from what came. On rank 0.
            WorkerGone: no worker is left. On rank 0.
        """
        found = self._asked.go_on(lambda: self._begin(step))
        return Batch() if found is Need.NOTHING else found

    def _begin(self, step: int) -> Asking[Batch]:
        assert self._source is not None
        return self._source.take(step)


class Collects(Protocol):
    """The collector."""

    @property
    def num_carried(self) -> int: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_carried(self, state: Mapping[str, Any], prompt_of: Callable[[int], Prompt]) -> None: ...

    def collect(
        self,
        prompts: Sequence[Prompt],
        *,
        sampling: SamplingParams,
        num_samples: int,
        description: str,
        first_ordinal: int = 0,
        enough: int | None = None,
        most_tokens: int | None = None,
        while_waiting: Callable[[], None] = ...,
    ) -> Asking[Collected]: ...


class Prompts(Protocol):
    """The dataset, at a place in it."""

    @property
    def epoch(self) -> float: ...

    @property
    def num_taken(self) -> int: ...

    def next_batch(self, size: int) -> Sequence[Prompt]: ...

    def at(self, ordinal: int) -> Prompt: ...

    def state_dict(self) -> dict[str, int]: ...

    def load_state_dict(self, state: Mapping[str, int]) -> None: ...


class SampledRollouts:
    """Rollouts of the next prompts. Rank 0 only."""

    def __init__(
        self,
        prompts: Prompts,
        collector: Collects,
        score: Callable[[Sequence[Group]], Scored],
        sampling: SamplingParams,
        *,
        num_samples: int,
        num_in_flight: int,
        enough: int | None = None,
        most_tokens: int | None = None,
        check_stop: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            score: the algorithm's.
            sampling: of the run; each group has a seed of its own, by its ordinal.
            num_samples: answers to each prompt.
            num_in_flight: prompts that are asked in each rollout, those that are carried among them.
            enough: groups that end a rollout; the others are carried into the next. None: all.
            most_tokens: as the collector takes it.
            check_stop: called again and again; raises StopAsked where the run is asked to stop.
        """
        self._prompts, self._collector, self._score = prompts, collector, score
        self._sampling = sampling
        self._num_samples, self._num_in_flight = num_samples, num_in_flight
        self._enough, self._most_tokens = enough, most_tokens
        self._check_stop = check_stop

    def state_dict(self) -> dict[str, Any]:
        """Where in the data the next rollout begins, and what is carried into it."""
        return {"prompts": self._prompts.state_dict(), **self._collector.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on there.

        Raises:
            SettingsError: the state is of other data.
        """
        self._prompts.load_state_dict(state["prompts"])
        if self._enough is None and state["groups"]:
            logger.warning(
                "%d groups that were in progress are dropped, as this run has no --partial-rollout",
                len(state["groups"]),
            )
            return
        self._collector.load_carried(state, self._prompts.at)

    def take(self, step: int) -> Asking[Batch]:
        """The rollout of a step, judged and scored.

        Raises:
            RunEnded: as `refuse_useless` does.
            StopAsked: the run is asked to stop. The next call would ask the same again.
        """
        before = self._prompts.state_dict()
        try:
            collected = yield from self._collect()
        except StopAsked:
            self._prompts.load_state_dict(before)
            raise
        refuse_useless(step, collected)
        scored = self._score(collected.groups)
        metrics = {**scored.metrics, **_sampling_metrics(collected), "epoch": float(self._prompts.epoch)}
        return Batch(groups=collected.groups, scored=scored, metrics=metrics)

    def _collect(self) -> Asking[Collected]:
        first_ordinal = self._prompts.num_taken
        return (
            yield from self._collector.collect(
                self._prompts.next_batch(max(0, self._num_in_flight - self._collector.num_carried)),
                # Every group draws anew, the same run draws the same again, and evaluations, whose seed is the run's,
                # draw otherwise.
                sampling=dataclasses.replace(self._sampling, seed=self._sampling.seed + 1),
                num_samples=self._num_samples,
                description="training samples",
                first_ordinal=first_ordinal,
                enough=self._enough,
                most_tokens=self._most_tokens,
                while_waiting=self._check_stop,
            )
        )


def refuse_useless(step: int, collected: Collected) -> None:
    """A rollout of which nothing can be learned is a broken set-up, not a bad score.

    Raises:
        RunEnded: every prompt failed, or the judge did: on more than half of the answers, or on all where that is 0.
    """
    if not collected.groups:
        raise RunEnded(f"rollout {step}: all of its prompts failed, the first with {collected.counts.why_failed}")
    verdicts = [episode.verdict for group in collected.groups for episode in group.episodes]
    errors = [verdict.error for verdict in verdicts if verdict.failed]
    num_unjudged = sum(verdict.reward is None for verdict in verdicts)
    if len(errors) == len(verdicts) or 2 * num_unjudged > len(verdicts):
        raise RunEnded(
            f"rollout {step}: the judge failed on {len(errors):,} of {len(verdicts):,} answers, first with {errors[0]}"
        )


def _sampling_metrics(collected: Collected) -> dict[str, float]:
    counts = collected.counts
    episodes = [episode for group in collected.groups for episode in group.episodes]
    turns = [turn for episode in episodes for turn in episode.turns]
    return {
        "prompts/failed": float(counts.failed),
        "prompts/retried": float(counts.retried),
        "prompts/unfinished": float(counts.unfinished),
        "prompts/stale": float(counts.stale),
        "samples/total": float(len(episodes)),
        # Without text, but for white space.
        "samples/empty": float(sum(not episode.response.strip() for episode in episodes)),
        # Sampled by more than one version of the weights.
        "samples/continued": float(sum(len(turn.completion.parts) > 1 for turn in turns)),
        "response_tokens": float(collected.num_tokens),
        "tokens_per_s/rollout": collected.num_tokens / collected.seconds,
        "seconds/rollout": collected.seconds,
    }
