"""Prompts -> judged groups: ask the workers, judge while others still generate, keep what came back whole."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from xrl.experience.asking import Asking, Need
from xrl.experience.partial import GroupInProgress, groups_of_state, groups_state
from xrl.launch.progress import Progress
from xrl.launch.stop import LOOK_S, StopAsked
from xrl.rewards import JudgePool
from xrl.rollout.dispatch import NoneReady, RolloutCounts
from xrl.rollout.fleet import Fleet
from xrl.types import Completion, Episode, GenerateRequest, Group, Prompt, SamplingParams, Verdict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("xrl")

# Between lines on how far a rollout is, where there is no terminal for a bar.
PROGRESS_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Collected:
    """One rollout."""

    groups: list[Group]  # in the order of the prompts; prompts that failed are missing
    counts: RolloutCounts
    seconds: float
    num_tokens: int  # response tokens


@dataclass(kw_only=True, eq=False)
class _Place:
    """One prompt of a rollout, and what has become of it."""

    group: GroupInProgress
    has_failed: bool = False  # one of its requests did, for good
    judging: list[_Judging] | None = None  # its answers, once they are all there

    def requests(
        self, sampling: SamplingParams, num_samples: int, name: str, *, most_tokens: int | None
    ) -> list[_Request]:
        """What is still to be asked."""
        requests = self.group.requests(sampling, num_samples, name, most_tokens=most_tokens)
        samples = self.group.places(num_samples)
        return [_Request(place=self, samples=each, request=one) for each, one in zip(samples, requests, strict=True)]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Request:
    """What the workers are asked, and for which of a place's samples."""

    place: _Place
    samples: list[int]
    request: GenerateRequest


@dataclass(frozen=True, kw_only=True, eq=False)
class _Judging:
    """An answer that is being judged."""

    completion: Completion
    response: str
    verdict: Future[Verdict]
    since: float  # when the judge was asked


class Collector:
    """Turns prompts into judged groups."""

    def __init__(
        self,
        fleet: Fleet,
        tokenizer: PreTrainedTokenizerBase,
        judge: JudgePool,
        progress: Progress | None = None,
    ) -> None:
        """
        Args:
            progress: advances with every request that ends, and with every verdict.
        """
        self.progress = progress or Progress()
        self.fleet = fleet
        self.tokenizer = tokenizer
        self.judge = judge
        self._carried: list[GroupInProgress] = []
        self._num_rollouts = 0  # evaluations among them: names of requests

    @property
    def num_carried(self) -> int:
        """Groups that were cut off, or came too late, in the last rollout with `enough`."""
        return len(self._carried)

    def state_dict(self) -> dict[str, Any]:
        """The groups that are carried into the next rollout."""
        return groups_state(self._carried)

    def load_carried(self, state: Mapping[str, Any], prompt_of: Callable[[int], Prompt]) -> None:
        """Carry the groups of a saved state.

        Args:
            prompt_of: the prompt of a group's ordinal.
        """
        self._carried = groups_of_state(state, prompt_of)

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
        while_waiting: Callable[[], None] = lambda: None,
    ) -> Asking[Collected]:
        """Draw `num_samples` answers to every prompt and judge them.

        A prompt whose request failed for good is left out and counted.

        Args:
            sampling: its seed is the stream's; each group draws from its own, by its ordinal.
            description: what the bar says it is for, "training samples" say.
            first_ordinal: of the first prompt's group in the stream; the others follow.
            enough: stop when so many groups are whole, the carried ones first among them. The others are carried into
                the next such call, and go on there from the tokens they have.
            most_tokens: by which each answer grows before it is looked at which groups are whole, and again as long as
                these are not enough: which ones they are depends on nothing but the draws. Default: the first to end
                are taken, whichever these are.
            while_waiting: called again and again, for answers and for verdicts. What it raises ends the rollout, of
                which nothing is kept: what was carried into it still is as it was.
        """
        start = time.perf_counter()
        counts = RolloutCounts()
        before = [each.copy() for each in self._carried]
        carried = self._take_carried() if enough is not None else []
        new = [GroupInProgress(prompt=each, ordinal=ordinal) for ordinal, each in enumerate(prompts, first_ordinal)]
        places = [_Place(group=group) for group in (*carried, *new)]
        self._num_rollouts += 1
        self._judge_first(places, enough)
        longest = None if most_tokens is None else sampling.max_new_tokens
        try:
            while _num_judged(places) != enough and (
                asked := [
                    each
                    for number, place in enumerate(places)
                    if place.judging is None and not place.has_failed
                    for each in place.requests(
                        sampling, num_samples, f"{self._num_rollouts}-{number}", most_tokens=most_tokens
                    )
                ]
            ):
                yield from self._answers(
                    places, asked, counts, description, enough, longest=longest, while_waiting=while_waiting
                )
                self._judge_first(places, enough)
            with self.progress.waiting(lambda: _verdicts_awaited(places)):
                groups = [
                    self._judged(place, sampling.temperature, while_waiting)
                    for place in places
                    if place.judging is not None
                ]
            while_waiting()  # a judge that was told to end together with the run has given no verdicts worth the name
        except StopAsked:
            self._carried = before
            raise
        if enough is not None:
            self._carried = [place.group for place in places if place.judging is None and not place.has_failed]
        if most_tokens is not None:
            counts.unfinished = sum(not group.is_whole for group in self._carried)
        _log_counts(description, counts)
        return Collected(
            groups=groups,
            counts=counts,
            seconds=time.perf_counter() - start,
            num_tokens=sum(episode.num_tokens for group in groups for episode in group.episodes),
        )

    def _answers(
        self,
        places: Sequence[_Place],
        asked: Sequence[_Request],
        counts: RolloutCounts,
        description: str,
        enough: int | None,
        *,
        longest: int | None,
        while_waiting: Callable[[], None],
    ) -> Asking[None]:
        """Give every place its answers as they come, and judge those that are whole, until there are `enough`.

        Args:
            longest: of an answer, where less is asked for now: then all are waited for, and none is judged yet.
        """
        with self._progress(len(asked), description) as advance:
            requests = [each.request for each in asked]
            for found in self.fleet.generate(requests, counts, updates=True, while_waiting=while_waiting):
                if isinstance(found, NoneReady):
                    yield Need.WEIGHTS
                    continue
                self.progress.advance()
                number, completions = found
                place = asked[number].place
                if completions:
                    place.group.take(asked[number].samples, completions, longest=longest)
                place.has_failed |= completions is None
                if longest is None and place.group.is_whole and place.judging is None and _num_judged(places) != enough:
                    self._judge_all(place)
                    if _num_judged(places) == enough:
                        self.fleet.cut_short()
                advance(counts)

    @contextlib.contextmanager
    def _progress(self, total: int, description: str) -> Iterator[Callable[[RolloutCounts], None]]:
        """A bar on a terminal, a line now and then elsewhere."""
        has_terminal = sys.stderr.isatty()
        said = time.perf_counter()
        with tqdm(
            total=total, desc=f"rollout_controller for {description}", disable=not has_terminal, leave=False
        ) as bar:

            def advance(counts: RolloutCounts) -> None:
                nonlocal said
                bar.update()
                if not has_terminal and time.perf_counter() - said > PROGRESS_S:
                    said = time.perf_counter()
                    done = counts.finished + counts.failed + counts.unfinished
                    logger.info("%s: %d of %d prompts done", description, done, total)

            yield advance

    def _take_carried(self) -> list[GroupInProgress]:
        carried, self._carried = self._carried, []
        return carried

    def _judge_first(self, places: Sequence[_Place], enough: int | None) -> None:
        """Judge the first places that are whole, as far as they are needed."""
        for place in places:
            if _num_judged(places) == enough:
                return
            if place.group.is_whole and place.judging is None and not place.has_failed:
                self._judge_all(place)

    def _judge_all(self, place: _Place) -> None:
        place.judging = [self._judge(place.group.prompt, completion) for completion in place.group.answers]

    def _judge(self, prompt: Prompt, completion: Completion) -> _Judging:
        response = str(self.tokenizer.decode(completion.token_ids.tolist(), skip_special_tokens=True))
        since = time.monotonic()
        return _Judging(
            completion=completion, response=response, verdict=self.judge.submit(response, prompt), since=since
        )

    def _judged(self, place: _Place, temperature: float, while_waiting: Callable[[], None]) -> Group:
        """Wait for the verdicts on a place's answers."""
        prompt, judging = place.group.prompt, place.judging or []
        episodes = []
        for each in self.progress.through(judging):
            while not each.verdict.done():  # a judge has a time-out for each answer, and fails it then
                while_waiting()
                wait([each.verdict], timeout=LOOK_S)
            episodes.append(_episode(prompt, each, temperature=temperature))
        return Group(episodes=tuple(episodes))


def _num_judged(places: Sequence[_Place]) -> int:
    """Places whose answers are judged, or are being."""
    return sum(place.judging is not None for place in places)


def _verdicts_awaited(places: Sequence[_Place]) -> str:
    """How many, and for how long: for people."""
    awaited = [each.since for place in places for each in place.judging or () if not each.verdict.done()]
    return f"{len(awaited)} verdicts, the longest for {time.monotonic() - min(awaited):.0f} s" if awaited else ""


def _episode(prompt: Prompt, judging: _Judging, *, temperature: float) -> Episode:
    verdict = judging.verdict.result(timeout=0)
    return Episode.of_answer(prompt, judging.completion, judging.response, verdict, temperature=temperature)


def _log_counts(description: str, counts: RolloutCounts) -> None:
    if counts.failed or counts.retried:
        logger.warning(
            "%s: sent %d, finished %d, failed %d, retried %d",
            description,
            counts.sent,
            counts.finished,
            counts.failed,
            counts.retried,
        )
