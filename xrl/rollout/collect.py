"""Prompts -> judged groups: ask the workers, judge while others still generate, keep what came back whole."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tqdm import tqdm

from xrl.launch.progress import Progress
from xrl.rewards import JudgePool, Verdict
from xrl.rollout.partial import GroupInProgress
from xrl.rollout.pool import RolloutCounts, WorkerPool
from xrl.types import Completion, GenerateRequest, Group, Prompt, Rollout, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("xrl")

# Between lines on how far a rollout is, where there is no terminal for a bar.
PROGRESS_S = 30.0
# Odd and large: seeds of neighbouring prompts and neighbouring rollouts never meet.
_SEED_STEP = 0x9E3779B97F4A7C15


@dataclass(frozen=True, kw_only=True)
class Collected:
    """One rollout."""

    groups: list[Group]  # in the order of the prompts; prompts that failed are missing
    counts: RolloutCounts
    seconds: float
    num_tokens: int  # response tokens


class Collector:
    """Turns prompts into judged groups."""

    def __init__(
        self,
        pool: WorkerPool,
        tokenizer: PreTrainedTokenizerBase,
        judge: JudgePool,
        progress: Progress | None = None,
    ) -> None:
        """
        Args:
            progress: advances with every request that ends, and with every verdict.
        """
        self.progress = progress or Progress()
        self.pool = pool
        self.tokenizer = tokenizer
        self.judge = judge
        self._carried: list[GroupInProgress] = []

    @property
    def num_carried(self) -> int:
        """Groups that were cut off, or came too late, in the last rollout with `enough`."""
        return len(self._carried)

    def collect(
        self,
        prompts: Sequence[Prompt],
        *,
        sampling: SamplingParams,
        num_samples: int,
        description: str,
        enough: int | None = None,
    ) -> Collected:
        """Draw `num_samples` answers to every prompt and judge them.

        A prompt whose request failed for good is left out and counted.

        Args:
            sampling: its seed is that of the rollout; each prompt draws from its own.
            description: what the bar says it is for, "training samples" say.
            enough: stop when so many groups are whole, the carried ones first among them. The others are carried into
                the next such call, and go on there from the tokens they have.
        """
        start = time.perf_counter()
        counts = RolloutCounts()
        groups = [*(self._take_carried() if enough is not None else []), *(GroupInProgress(prompt=p) for p in prompts)]
        asked: list[tuple[int, list[int]]] = []  # of each request: its group, and the samples it is for
        requests: list[GenerateRequest] = []
        for place, group in enumerate(groups):
            asked += [(place, samples) for samples in group.places(num_samples)]
            requests += group.requests(*_named(place, sampling, num_samples))
        whole = [place for place, group in enumerate(groups) if group.is_whole][:enough]
        judged = {place: self._judge_all(groups[place]) for place in whole}
        if len(judged) == enough:
            requests = []
        failed: set[int] = set()
        with self._progress(len(requests), description) as advance:
            for number, completions in self.pool.generate(requests, counts):
                self.progress.advance()
                place, samples = asked[number]
                group = groups[place]
                if completions:
                    group.take(samples, completions)
                if completions is None:
                    failed.add(place)
                if group.is_whole and place not in judged and len(judged) != enough:
                    judged[place] = self._judge_all(group)
                    if len(judged) == enough:
                        self.pool.cut_short()
                advance(counts)
        if enough is not None:
            self._carried = [group for place, group in enumerate(groups) if place not in failed and place not in judged]
        found = [
            Group(
                rollouts=tuple(
                    _rollout(groups[place].prompt, *parts, temperature=sampling.temperature)
                    for parts in self.progress.through(judged[place])
                )
            )
            for place in sorted(judged)
        ]
        _log_counts(description, counts)
        return Collected(
            groups=found,
            counts=counts,
            seconds=time.perf_counter() - start,
            num_tokens=sum(len(r.completion.token_ids) for group in found for r in group.rollouts),
        )

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

    def _judge_all(self, group: GroupInProgress) -> list[tuple[Completion, str, Future[Verdict]]]:
        return [self._judge(group.prompt, completion) for completion in group.answers]

    def _judge(self, prompt: Prompt, completion: Completion) -> tuple[Completion, str, Future[Verdict]]:
        response = str(self.tokenizer.decode(completion.token_ids, skip_special_tokens=True))
        return completion, response, self.judge.submit(response, prompt)


def _named(place: int, sampling: SamplingParams, num_samples: int) -> tuple[SamplingParams, int, str]:
    """Sampling, number of samples and name of a group's requests."""
    # The place, not the prompt's id: a batch that crosses an epoch may hold a prompt twice.
    seed = (sampling.seed * _SEED_STEP + place) % 2**63
    return dataclasses.replace(sampling, seed=seed), num_samples, f"{sampling.seed}-{place}"


def _rollout(
    prompt: Prompt, completion: Completion, response: str, verdict: Future[Verdict], *, temperature: float
) -> Rollout:
    result = verdict.result()  # Unbounded: a judge has a time-out for each answer, and fails it then.
    return Rollout(
        prompt=prompt,
        completion=completion,
        response=response,
        reward=result.reward,
        temperature=temperature,
        judge_error=result.error,
    )


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
